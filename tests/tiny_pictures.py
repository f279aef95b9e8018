"""Random tiny pipelines of the other picture generators' true classes, for tests of parity."""

# pyright: reportArgumentType=false
# diffusers annotates its configurations by their defaults: block_out_channels is a "tuple[int]" to it.
from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.tiny import WORDS, tiny_flux, tiny_tokenizer

VOCABULARY = len(WORDS) + 3
CHAT = "{% for m in messages %}of {{ m['content'] }}{% endfor %} on"
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
QWEN = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def tiny_flux_dev() -> Any:
    """FLUX.1-dev's traits: embedded guidance, a shift that grows with the picture."""
    pipeline = tiny_flux(guidance_embeds=True)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC))
    return pipeline


def tiny_kontext() -> Any:
    parts = {name: part for name, part in tiny_flux_dev().components.items() if part is not None}
    return FluxKontextPipeline(**parts)


def tiny_klein(distilled: bool = False) -> Any:
    torch.manual_seed(0)
    return _still(
        Flux2KleinPipeline(
            **_flux2(guidance_embeds=False),
            text_encoder=Qwen3ForCausalLM(Qwen3Config(**QWEN, num_hidden_layers=28)),  # layers 9, 18 and 27 are read
            tokenizer=_chatty(16),
            is_distilled=distilled,
        )
    )


def tiny_flux2_dev() -> Any:
    torch.manual_seed(0)
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    text = {"model_type": "mistral", **QWEN, "num_hidden_layers": 31}  # layers 10, 20 and 30 are read
    tokenizer = tiny_tokenizer(64)  # the released pipeline has a PixtralProcessor, which needs torchvision
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }} {% endfor %}of {% endfor %}"
    )
    config = Mistral3Config(vision_config=vision, text_config=text, image_token_index=2)
    return _still(
        Flux2Pipeline(
            **_flux2(guidance_embeds=True), text_encoder=Mistral3ForConditionalGeneration(config), tokenizer=tokenizer
        )
    )


def _flux2(guidance_embeds: bool) -> dict[str, Any]:
    """What the pipelines of FLUX.2 have in common."""
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(**_vae(), latent_channels=4)
    assert vae.bn.running_mean is not None and vae.bn.running_var is not None
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return {"scheduler": FlowMatchEulerDiscreteScheduler(**DYNAMIC), "vae": vae, "transformer": transformer}


def tiny_sd3() -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=8,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    clip = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=VOCABULARY,
        projection_dim=16, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, pad_token_id=0, eos_token_id=1
    )
    return _still(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(),
            text_encoder=CLIPTextModelWithProjection(clip),
            tokenizer=tiny_tokenizer(16),
            text_encoder_2=CLIPTextModelWithProjection(clip),
            tokenizer_2=tiny_tokenizer(16),
            text_encoder_3=T5EncoderModel(t5),
            tokenizer_3=tiny_tokenizer(16),
        )
    )


def tiny_qwen_image() -> Any:
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {name: value for name, value in QWEN.items() if name != "head_dim"} | {
        "num_hidden_layers": 1, "rope_parameters": rope, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    return _still(
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC, shift_terminal=0.02),
            vae=AutoencoderKLQwenImage(
                base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.5, 0.8, 1.0, 1.2],
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
            tokenizer=tiny_tokenizer(128),
            transformer=QwenImageTransformer2DModel(
                in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
            ),
        )
    )  # fmt: skip


def tiny_z_image() -> Any:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[64, 16, 16],
    )  # fmt: skip
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return _still(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
            vae=_autoencoder(),
            text_encoder=Qwen3Model(Qwen3Config(**QWEN, num_hidden_layers=2)),
            tokenizer=_chatty(16),
            transformer=transformer,
        )
    )


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(**_vae(), latent_channels=4, shift_factor=0.1, scaling_factor=0.5)


def _vae() -> dict[str, Any]:
    return {
        "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 32,
        "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False,
    }  # fmt: skip


def _chatty(length: int) -> Any:
    """A tokenizer with a chat template, as Qwen's has one."""
    tokenizer = tiny_tokenizer(length)
    tokenizer.chat_template = CHAT
    return tokenizer


def _still(pipeline: Any) -> Any:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline
