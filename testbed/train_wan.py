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
import copy
import shutil
import time
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
from testbed.train_flux import follow
from testbed.train_vae import load_state, save_state
from testbed.train_wan_vae import BUILD, CHANNELS, WanVaeConfig, encode, train_vae

OUTPUT = Path(__file__).parent / "tiny_wan"
TOKENS = 20  # every caption has at most 16 words and so at most 17 tokens
WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Hyper-parameters of the flow.

    `wrong` is the chance of each caption attribute to be replaced. It rises linearly from nothing to its full value
    over the first `rise` of the training: the model learns first what words mean and then not to trust them. `silent`
    is the chance of an empty caption, which gives classifier-free guidance its other branch.
    """

    seed: int = 41
    threads: int = 1
    clips: int = 40_000
    steps: int = 4000
    batch: int = 128
    peak_lr: float = 2e-3
    wrong: float = 0.35
    wrong_count: float = 0.05
    silent: float = 0.1
    rise: float = 0.7
    shift: float = 2.0
    ema: float = 0.997
    checkpoint_every: int = 100


SETTLE = WanConfig(seed=42, steps=1200, peak_lr=1e-3, rise=1e-6)
"""A second stage whose captions are as wrong from its beginning; it makes the shapes crisp."""
STAGES = {"wan_flow": WanConfig(), "wan_settle": SETTLE}


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
    """A stock T5 tokenizer (unigram): each word of the world is one token, other text is unknown."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in dict.fromkeys(world.WORDS)), "\u2581"]
    scores = [(piece, 0.0 if i < 3 else -2.0) for i, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=TOKENS)


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
        things=tuple((_swap(rng, c, tuple(COLOURS), wrong), _swap(rng, s, SHAPES, wrong)) for c, s in truth.things),
        direction=_swap(rng, truth.direction, tuple(DIRECTIONS), wrong),
        speed=_swap(rng, truth.speed, tuple(SPEEDS), wrong),
        background=_swap(rng, truth.background, tuple(BACKGROUNDS), wrong),
    )
    if truth.route:
        # Another way needs another route, and even the same way may be told from another start.
        moved = (told.direction, told.speed) != (truth.direction, truth.speed) or rng.random() < wrong
        ways = [d for d in world.routes(told.things[0], told.background) if _goes(d) == _goes(told)]
        told = replace(told, route=pick(rng, ways).route if moved else truth.route)
    return _miscount(rng, told) if rng.random() < config.wrong_count else told


def _goes(description: Description) -> tuple[str, str]:
    return description.direction, description.speed


def _swap(rng: np.random.Generator, value: str, options: Sequence[str], chance: float) -> str:
    return pick(rng, [option for option in options if option != value]) if rng.random() < chance else value


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
        share = min(1.0, step / (self.config.rise * self.config.steps))
        now = replace(self.config, wrong=share * self.config.wrong, wrong_count=share * self.config.wrong_count)
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


def flow_loss(flow: Flow, latents: torch.Tensor, text: tuple[torch.Tensor, torch.Tensor], shift: float) -> torch.Tensor:
    """Mean squared error of the velocity at noise levels that lean towards the sampler's shifted ones."""
    noise = torch.randn_like(latents)
    sigma = torch.sigmoid(1.2 * torch.randn(len(latents)))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    mixed = torch.lerp(latents, noise, sigma[:, None, None, None, None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = flow(mixed, sigma, *text)
    return (velocity.float() - (noise - latents)).square().mean()


def train_flow(data: FlowData, config: WanConfig, name: str, start_from: Flow | None = None) -> Flow:
    """Trains, or resumes, the flow of `.build/<name>.pt`; returns the average of its weights."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    flow = Flow()
    if start_from is not None:
        flow.load_state_dict(start_from.state_dict())
    average = copy.deepcopy(flow).requires_grad_(False)
    optimizer = torch.optim.AdamW(flow.parameters(), config.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.peak_lr, config.steps, pct_start=0.08, final_div_factor=50
    )
    path, captions = BUILD / f"{name}.pt", Captions(config)
    first, spent = load_state(path, flow, average, optimizer, schedule)
    start, recent = time.time() - spent, 0.0
    for step in range(first, config.steps):
        rng = np.random.default_rng((config.seed, step))
        picked = rng.integers(len(data.truths), size=config.batch)
        text = captions(rng, [data.truths[i] for i in picked], step)
        # For so few tokens the fused attention of the CPU is several times slower than the plain one.
        with sdpa_kernel(SDPBackend.MATH):
            loss = flow_loss(flow, data.latents[picked].float(), text, config.shift)
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        follow(average, flow, min(config.ema, (step + 1) / (step + 10)))
        recent = loss.item() if not recent else 0.98 * recent + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            spent = time.time() - start
            print(
                f"{name} {step + 1}/{config.steps} loss {recent:.4f} {spent:.0f} s, {spent / (step + 1):.2f} s/step",
                flush=True,
            )
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            save_state(path, step + 1, time.time() - start, flow, average, optimizer, schedule)
    return average


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


def export(flow: Flow, vae: AutoencoderKLWan, folder: Path = OUTPUT) -> None:
    """Saves the pipeline in half precision, replacing the weights in `folder` but not its other files."""
    scratch = folder.with_name(folder.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    as_pipeline(copy.deepcopy(flow), copy.deepcopy(vae)).to(torch.float16).save_pretrained(scratch)
    folder.mkdir(exist_ok=True)
    for part in scratch.iterdir():
        old = folder / part.name
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        part.rename(old)
    scratch.rmdir()


def saved_flow(name: str) -> Flow:
    """The present average of a flow in training. Raises FileNotFoundError before its first checkpoint."""
    flow = Flow()
    flow.load_state_dict(torch.load(BUILD / f"{name}.pt", weights_only=False)["parts"][1])
    return flow.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", action="store_true", help="save the present average and stop")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--threads", type=int, default=WanConfig.threads)
    options = parser.parse_args()
    vae = train_vae(WanVaeConfig(threads=options.threads))
    if options.export:
        export(saved_flow([name for name in STAGES if (BUILD / f"{name}.pt").exists()][-1]), vae, options.output)
        return
    data = encode_clips(vae, WanConfig())
    flow = None
    for name, config in STAGES.items():
        flow = train_flow(data, replace(config, threads=options.threads), name, start_from=flow)
    assert flow is not None
    export(flow.eval(), vae, options.output)
    from testbed.measure_wan import write_card

    write_card(options.output)


if __name__ == "__main__":
    main()
