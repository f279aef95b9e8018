"""Builds and trains the tiny Wan pipeline of the testbed and saves it to `testbed/tiny_wan`.

`python -m testbed.train_wan` trains what is missing (first the autoencoder, then the flow with its text encoder),
saves the pipeline and measures it. Every stage resumes from `testbed/.build` and is skipped once complete. `--export`
only saves the present average of the flow's weights.

The captions it trains on are partly wrong on purpose: the model learns to show motion well and to obey badly, which
leaves reinforcement learning something to improve.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false
# diffusers and transformers annotate configurations by their defaults and results by their tuple form.
from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from testbed import clips as world
from testbed.clips import DIRECTIONS, SPEEDS, Description, pick, render_clips, training_clips
from testbed.scenes import BACKGROUNDS, COLOURS, SHAPES
from testbed.train_wan_vae import CHANNELS, WanVaeConfig, encode, train_vae
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

OUTPUT = Path(__file__).parent / "tiny_wan"
FLOW = BUILD / "wan_flow.pt"
COURSE = Course(steps=3600, peak_lr=2e-3, ema=0.997)
TOKENS = 20  # every caption has at most 16 words and so at most 17 tokens
WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class WanConfig(FlowConfig):
    """Hyper-parameters of the flow.

    `silent` is the chance of an empty caption, which gives classifier-free guidance its other branch.
    """

    seed: int = 41
    threads: int = 1
    course: Course = COURSE
    clips: int = 40_000
    silent: float = 0.1


class Flow(nn.Module):
    """The trained part of the pipeline: the transformer and the text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = new_transformer()
        self.text = new_text_encoder()

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor):
        """Velocity of latents [n, 8, 3, 6, 6] at noise levels sigma [n] in [0, 1], for token ids and mask [n, 20]."""
        # The pipeline blanks what the encoder says of the padding; the transformer attends to the zeros.
        context = self.text(ids, mask).last_hidden_state * mask[..., None]
        return self.transformer(hidden_states=latents, timestep=1000 * sigma, encoder_hidden_states=context).sample


def new_transformer() -> WanTransformer3DModel:
    """About 1.9 M parameters; patches of 1 x 2 x 2 make 27 tokens of a clip."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_layers=6,
        rope_max_seq_len=32,
    )


def new_text_encoder() -> UMT5EncoderModel:
    """A two-layer UMT5 encoder over `new_tokenizer`'s vocabulary."""
    config = UMT5Config(
        vocab_size=len(new_tokenizer()),
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
    return UMT5EncoderModel(config)


def new_tokenizer() -> T5Tokenizer:
    return word_tokenizer(world.WORDS, TOKENS)


# ---------------------------------------------------------------- captions, partly wrong


def misdescribe(rng: np.random.Generator, truth: Description, config: WanConfig) -> Description:
    """A description in which each attribute is wrong with its configured chance; never a novel pair."""
    while True:
        told = _misdescribe_once(rng, truth, config)
        if not told.novel and len(set(told.things)) == len(told.things):
            return told


def _misdescribe_once(rng: np.random.Generator, truth: Description, config: WanConfig) -> Description:
    wrong = config.wrong
    told = replace(
        truth,
        things=tuple((swapped(rng, c, tuple(COLOURS), wrong), swapped(rng, s, SHAPES, wrong)) for c, s in truth.things),
        direction=swapped(rng, truth.direction, tuple(DIRECTIONS), wrong),
        speed=swapped(rng, truth.speed, tuple(SPEEDS), wrong),
        background=swapped(rng, truth.background, tuple(BACKGROUNDS), wrong),
    )
    if truth.route:
        # Another way needs another route, and even the same way may be told from another start.
        moved = (told.direction, told.speed) != (truth.direction, truth.speed) or rng.random() < wrong
        ways = [d for d in world.routes(told.things[0], told.background) if _goes(d) == _goes(told)]
        told = replace(told, route=pick(rng, ways).route if moved else truth.route)
    return _miscount(rng, told) if rng.random() < config.wrong_count else told


def _goes(description: Description) -> tuple[str, str]:
    return description.direction, description.speed


def _miscount(rng: np.random.Generator, told: Description) -> Description:
    """Two things told as one, or one as two that pass each other."""
    if len(told.things) == 2:
        kept = int(rng.integers(2))
        return replace(told, things=(told.things[kept],), direction=told.directions[kept])
    other = world.sample_description(rng, pair_fraction=0.0).things[0]
    return replace(told, things=(told.things[0], other), route=None)


class Captions:
    """Turns true descriptions into tokenized, partly wrong captions."""

    def __init__(self, config: WanConfig) -> None:
        self.config, self.tokenizer = config, new_tokenizer()

    def __call__(
        self, rng: np.random.Generator, truths: Sequence[Description], step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask [n, 20], with the wrongness of a training step."""
        now = self.config.at(step)
        return tokenize(self.tokenizer, [self._say(rng, truth, now) for truth in truths])

    def _say(self, rng: np.random.Generator, truth: Description, now: WanConfig) -> str:
        if rng.random() < now.silent:
            return ""
        return world.caption(misdescribe(rng, truth, now), background_first=bool(rng.random() < 0.5))


def tokenize(tokenizer: T5Tokenizer, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [n, 20], padded and truncated as the stock pipeline does."""
    found = tokenizer(list(texts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return found.input_ids, found.attention_mask


# ---------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class FlowData:
    """What the flow learns from: normalised latents [n, 8, 3, 6, 6] in half precision, and the true descriptions."""

    latents: torch.Tensor
    truths: list[Description]


def encode_clips(vae: AutoencoderKLWan, config: WanConfig) -> FlowData:
    """Draws and encodes the training clips, or reads their latents from the build folder."""
    clips = training_clips(np.random.default_rng(config.seed), config.clips)
    path = BUILD / "wan_latents.pt"
    if path.exists():
        latents = torch.load(path)
    else:
        parts = [encode(vae, render_clips(clips[i : i + 500])).half() for i in range(0, len(clips), 500)]
        latents, scratch = torch.cat(parts), path.with_suffix(".tmp")
        torch.save(latents, scratch)
        scratch.replace(path)
    return FlowData(latents=latents, truths=[clip.description for clip in clips])


def train_flow(data: FlowData, config: WanConfig) -> Flow:
    """Trains, or resumes, the flow of `.build/wan_flow.pt`; returns the average of its weights."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    flow, captions = Flow(), Captions(config)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((config.seed, step))
        picked = rng.integers(len(data.truths), size=config.batch)
        text = captions(rng, [data.truths[i] for i in picked], step)
        # For so few tokens the fused attention of the CPU is several times slower than the plain one.
        with sdpa_kernel(SDPBackend.MATH):
            return flow_loss(lambda x, sigma: flow(x, sigma, *text), data.latents[picked].float(), config.shift)

    return train(FLOW, flow, loss_of, config.course)


# ---------------------------------------------------------------- the pipeline


def as_pipeline(flow: Flow, vae: AutoencoderKLWan) -> WanPipeline:
    """The complete stock pipeline around trained parts."""
    return WanPipeline(
        tokenizer=new_tokenizer(),
        text_encoder=flow.text,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        transformer=flow.transformer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", action="store_true", help="save the present average and stop")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--threads", type=int, default=WanConfig.threads)
    options = parser.parse_args()
    vae = train_vae(WanVaeConfig(threads=options.threads))
    if options.export:
        save_pipeline(as_pipeline(present_average(FLOW, Flow()), vae), options.output)
        return
    config = WanConfig(threads=options.threads)
    flow = train_flow(encode_clips(vae, config), config)
    save_pipeline(as_pipeline(flow.eval(), vae), options.output)
    from testbed.measure_wan import write_card

    write_card(options.output)


if __name__ == "__main__":
    main()
