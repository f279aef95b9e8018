"""Builds and trains the tiny FLUX pipeline of the testbed and saves it to `testbed/tiny_flux`.

`python -m testbed.train_flux` trains what is missing (first the autoencoder, then the flow with both text
encoders), saves the pipeline and measures it. Every stage resumes from `testbed/.build` and is skipped once
complete. `--export` only saves the present average of the flow's weights.

The captions it trains on are partly wrong on purpose: the model learns to draw well and to obey badly, which
leaves reinforcement learning something to improve.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false
# diffusers and transformers annotate configurations by their defaults and results by their tuple form.
from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from testbed import scenes as world
from testbed.render import render_many
from testbed.scenes import Description, Thing
from testbed.train_vae import VaeConfig, to_tensor, train_vae, training_scenes
from testbed.training import (
    BUILD,
    Course,
    FlowConfig,
    flow_loss,
    present_average,
    save_pipeline,
    swapped,
    train,
    word_tokenizer,
)

OUTPUT = Path(__file__).parent / "tiny_flux"
TOKENS = 16  # every caption has at most 12 words and so at most 14 tokens
FLOW = BUILD / "flow.pt"
COURSE = Course(steps=3600, peak_lr=2e-3, ema=0.997)
LONG_TOKENS = 32  # also trained, so that a caller may leave more room for text
WIDTH, POOLED = 128, 64


@dataclass(frozen=True, kw_only=True)
class FluxConfig(FlowConfig):
    """Hyper-parameters of the flow; a share `long_fraction` of the batches has captions padded to `LONG_TOKENS`."""

    seed: int = 23
    threads: int = 2
    course: Course = COURSE
    images: int = 40_000
    long_fraction: float = 0.1


class Flow(nn.Module):
    """The trained part of the pipeline: the transformer and both text encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = new_transformer()
        self.clip = new_clip()
        self.t5 = new_t5()

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, clip_ids: torch.Tensor, t5_ids: torch.Tensor):
        """Velocity [n, 16, 32] of packed latents [n, 16, 32] at noise levels sigma [n] in [0, 1]."""
        context = self.t5(t5_ids).last_hidden_state
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=context,
            pooled_projections=self.clip(clip_ids).pooler_output,
            timestep=sigma,
            img_ids=image_ids(),
            txt_ids=torch.zeros(context.shape[1], 3),
        ).sample


def new_transformer() -> FluxTransformer2DModel:
    """About 2.3 M parameters; 8 latent channels packed 2 x 2 make 32 per token."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def new_clip() -> CLIPTextModel:
    """A two-layer CLIP text encoder over `new_clip_tokenizer`'s vocabulary."""
    tokenizer = new_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED,
        intermediate_size=2 * POOLED,
        projection_dim=POOLED,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_t5() -> T5EncoderModel:
    """A two-layer T5 encoder over `new_t5_tokenizer`'s vocabulary."""
    config = T5Config(
        vocab_size=len(new_t5_tokenizer()),
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
    )
    return T5EncoderModel(config)


def new_t5_tokenizer() -> T5Tokenizer:
    return word_tokenizer(world.WORDS, TOKENS)


def new_clip_tokenizer() -> CLIPTokenizer:
    """A stock CLIP tokenizer: each word of the world is one token, other words fall into letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(world.WORDS):
        # Built from the last letter, which marks the end of the word, so that merges stay inside a word.
        tail = f"{word[-1]}</w>"
        for letter in reversed(word[:-1]):
            if (letter, tail) not in merges:
                merges.append((letter, tail))
            tail = letter + tail
            pieces.append(tail)
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def image_ids() -> torch.Tensor:
    """Positions [16, 3] of the packed latents as the stock pipeline numbers them."""
    return FluxPipeline._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[n, 8, 8, 8] latents to [n, 16, 32] tokens of 2 x 2 cells, as the stock pipeline packs them."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def misdescribe(rng: np.random.Generator, truth: Description, config: FluxConfig) -> Description:
    """A description in which each attribute is wrong with its configured chance; never a novel pair."""
    wrong = config.wrong
    while True:
        things = tuple(_misdescribe_thing(rng, thing, wrong) for thing in truth.things)
        relation = truth.relation and swapped(rng, truth.relation, world.RELATIONS, wrong)
        if rng.random() < config.wrong_count:
            things, relation = _miscount(rng, things)
        background = swapped(rng, truth.background, tuple(world.BACKGROUNDS), wrong)
        told = Description(things=things, relation=relation, background=background)
        if not told.novel and len({(t.colour, t.shape) for t in things}) == len(things):
            return told


def _misdescribe_thing(rng: np.random.Generator, thing: Thing, wrong: float) -> Thing:
    return Thing(
        colour=swapped(rng, thing.colour, tuple(world.COLOURS), wrong),
        shape=swapped(rng, thing.shape, world.SHAPES, wrong),
        size=thing.size and swapped(rng, thing.size, world.SIZES, wrong),
    )


def _miscount(rng: np.random.Generator, things: tuple[Thing, ...]) -> tuple[tuple[Thing, ...], str | None]:
    """Two things told as one, or one as two."""
    if len(things) == 2:
        return (things[int(rng.integers(2))],), None
    other = world.sample_description(rng, pair_fraction=0.0).things[0]
    pair = (replace(things[0], size=None), replace(other, size=None))
    relation = world.RELATIONS[int(rng.integers(4))]
    return pair if rng.random() < 0.5 else pair[::-1], relation


@dataclass(frozen=True, kw_only=True)
class FlowData:
    """What the flow learns from: packed latents [n, 16, 32] and the true descriptions."""

    latents: torch.Tensor
    truths: list[Description]


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, config: FluxConfig) -> FlowData:
    """Draws and encodes the training scenes, or reads them from the build folder."""
    scenes = training_scenes(np.random.default_rng(config.seed), config.images)
    path = BUILD / "latents.pt"
    if path.exists():
        latents = torch.load(path)
    else:
        parts = [_encode(vae, scenes[i : i + 256]) for i in range(0, len(scenes), 256)]
        latents = torch.cat(parts)
        torch.save(latents, path)
    return FlowData(latents=latents, truths=[scene.description for scene in scenes])


def _encode(vae: AutoencoderKL, scenes: list[world.Scene]) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = vae.encode(to_tensor(render_many(scenes))).latent_dist.mean.float()
    return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)


class Captions:
    """Turns true descriptions into tokenized, partly wrong captions."""

    def __init__(self, config: FluxConfig) -> None:
        self.config, self.clip, self.t5 = config, new_clip_tokenizer(), new_t5_tokenizer()

    def __call__(
        self, rng: np.random.Generator, truths: list[Description], step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP ids [n, 16] and T5 ids [n, 16 or 32], with the wrongness of a training step."""
        now = self.config.at(step)
        told = [misdescribe(rng, truth, now) for truth in truths]
        texts = [world.caption(d, background_first=bool(rng.random() < 0.5)) for d in told]
        length = LONG_TOKENS if rng.random() < self.config.long_fraction else TOKENS
        return tokenize(self.clip, texts, TOKENS), tokenize(self.t5, texts, length)


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, texts: list[str], length: int) -> torch.Tensor:
    """Token ids [n, length], padded and truncated as the stock pipeline does."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def train_flow(data: FlowData, config: FluxConfig) -> Flow:
    """Trains, or resumes, the flow of `.build/flow.pt`; returns the average of its weights."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    flow, captions = Flow(), Captions(config)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((config.seed, step))
        picked = rng.integers(len(data.truths), size=config.batch)
        ids = captions(rng, [data.truths[i] for i in picked], step)
        # For so few tokens the fused attention of the CPU is several times slower than the plain one.
        with sdpa_kernel(SDPBackend.MATH):
            return flow_loss(lambda x, sigma: flow(x, sigma, *ids), data.latents[picked], config.shift)

    return train(FLOW, flow, loss_of, config.course)


def as_pipeline(flow: Flow, vae: AutoencoderKL) -> FluxPipeline:
    """The complete stock pipeline around trained parts."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=flow.clip,
        tokenizer=new_clip_tokenizer(),
        text_encoder_2=flow.t5,
        tokenizer_2=new_t5_tokenizer(),
        transformer=flow.transformer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", action="store_true", help="save the present average and stop")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    vae = train_vae(VaeConfig())
    if options.export:
        save_pipeline(as_pipeline(present_average(FLOW, Flow()), vae), options.output)
        return
    config = FluxConfig()
    flow = train_flow(encode_scenes(vae, config), config)
    save_pipeline(as_pipeline(flow.eval(), vae), options.output)
    from testbed.measure_flux import write_card

    write_card(options.output)


if __name__ == "__main__":
    main()
