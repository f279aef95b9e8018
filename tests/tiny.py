"""Random tiny pipelines of the true classes, built in a second: for tests that need shapes, not skill."""

# pyright: reportArgumentType=false
# diffusers annotates its configurations by their defaults: block_out_channels is a "tuple[int]" to it.
from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ["a", "red", "green", "blue", "circle", "square", "on", "black", "white", "background", "left", "of"]


def tiny_tokenizer(length: int) -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def tiny_flux(guidance_embeds: bool = False, seed: int = 0) -> FluxPipeline:
    """A FluxPipeline with random weights: 32×32 pictures are 4 tokens of 16 channels."""
    torch.manual_seed(seed)
    words = len(WORDS) + 3
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=32, use_quant_conv=False,
        use_post_quant_conv=False, mid_block_add_attention=False, shift_factor=0.1, scaling_factor=0.5,
    )  # fmt: skip
    clip = CLIPTextConfig(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=words,
                          max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=1)  # fmt: skip
    t5 = T5Config(
        vocab_size=words, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=tiny_tokenizer(16),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tiny_tokenizer(16),
        transformer=transformer,
    )
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.eval()  # T5 has dropout
    return pipeline


def save_tiny_flux(folder: Path, guidance_embeds: bool = False) -> str:
    """Save one and return its folder, as Flux(model=…) takes it."""
    tiny_flux(guidance_embeds).save_pretrained(folder)
    return str(folder)


def tiny_wan(boundary: float | None = None, seed: int = 0) -> WanPipeline:
    """A WanPipeline with random weights: 5 frames of 32×32 are 2·4·4 tokens of 4 channels. A boundary brings two experts."""
    torch.manual_seed(seed)
    first, *second = (_tiny_wan_transformer() for _ in range(1 if boundary is None else 2))
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.5, 0.8, 1.0, 1.2],
    )  # fmt: skip
    text = UMT5Config(
        vocab_size=len(WORDS) + 3,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    pipeline = WanPipeline(
        tokenizer=tiny_tokenizer(16),  # pyright: ignore[reportArgumentType]
        text_encoder=UMT5EncoderModel(text),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=first,
        transformer_2=second[0] if second else None,
        boundary_ratio=boundary,
    )
    for part in (first, *second, vae, pipeline.text_encoder):
        part.eval()
    return pipeline


def _tiny_wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def write_prompts(path: Path, count: int) -> str:
    """A prompts file over the tiny vocabulary."""
    shapes, colours = ("circle", "square"), ("red", "green", "blue")
    lines = [
        json.dumps(
            {"id": f"p{i}", "text": f"a {colours[i % 3]} {shapes[i % 2]} on a black background", "reference": {"n": i}}
        )
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def save_tiny_clip(folder: Path) -> str:
    """Save a random CLIPModel with 8-dimensional embeddings and its processor; the tokeniser knows letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    letters = [chr(97 + i) for i in range(26)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(vocabulary)}, merges=[], model_max_length=16)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    words = {"vocab_size": len(vocabulary), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config=shape | words | {"max_position_embeddings": 16},
        vision_config=shape | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer).save_pretrained(folder)
    return str(folder)
