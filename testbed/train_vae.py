"""Trains the testbed's AutoencoderKL on rendered scenes (64 x 64 pixels to 8 x 8 latents of 8 channels).

`python -m testbed.train_vae` resumes from `testbed/.build/vae.pt` and returns at once when that is complete.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false
# diffusers and transformers annotate configurations by their defaults and results by their tuple form.
from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from testbed.render import render_many
from testbed.scenes import Scene, canonical, heldout_descriptions, sample_description, sample_scene

BUILD = Path(__file__).parent / ".build"


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Hyper-parameters; `kl` weighs the mean KL of a latent element (nats) against pixel errors."""

    seed: int = 11
    threads: int = 2
    steps: int = 3000
    batch: int = 32
    peak_lr: float = 2e-3
    kl: float = 5e-4
    foreground: float = 2.0
    checkpoint_every: int = 250
    statistics_images: int = 4096


def new_vae() -> AutoencoderKL:
    """The untrained autoencoder, about 1 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def training_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Random scenes without novel pairs and without any description of a held-out prompt."""
    closed, scenes = set(heldout_descriptions()), []
    while len(scenes) < count:
        description = sample_description(rng)
        if canonical(description) not in closed:
            scenes.append(sample_scene(rng, description))
    return scenes


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] to float32 [n, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float [n, 3, H, W] in [-1, 1] to uint8 [n, H, W, 3]."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, config: VaeConfig) -> torch.Tensor:
    """Pixel error (shapes weigh more than background, lest small colours drown) plus a small KL."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample()).sample
    error = output.float() - images
    background = images[:, :, :1, :1]  # objects keep a margin, so the corner is always background
    weight = 1 + config.foreground * ((images - background).abs().amax(1, keepdim=True) > 0.05)
    return (weight * (error.abs() + 2 * error**2)).mean() + config.kl * posterior.kl().mean() / 512


def load_state(path: Path, *parts: Any) -> tuple[int, float]:
    """Restores `parts` from a checkpoint, if there is one; finished steps and seconds spent on them."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=False)
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    return int(state["step"]), float(state["seconds"])


def save_state(path: Path, step: int, seconds: float, *parts: Any) -> None:
    """Writes a checkpoint so that a crash never leaves half of one."""
    scratch = path.with_suffix(".tmp")
    torch.save({"step": step, "seconds": seconds, "parts": [part.state_dict() for part in parts]}, scratch)
    scratch.replace(path)


def train_vae(config: VaeConfig) -> AutoencoderKL:
    """Trains, or resumes, and returns the autoencoder with its latents' shift and scale set."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), config.peak_lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.peak_lr, config.steps, pct_start=0.1, final_div_factor=100
    )
    BUILD.mkdir(exist_ok=True)
    path = BUILD / "vae.pt"
    first, spent = load_state(path, vae, optimizer, schedule)
    start = time.time() - spent
    for step in range(first, config.steps):
        rng = np.random.default_rng((config.seed, step))
        loss = vae_loss(vae, to_tensor(render_many(training_scenes(rng, config.batch))), config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(
                f"vae {step + 1}/{config.steps} loss {loss.item():.4f} {time.time() - start:.0f} s",
                flush=True,
            )
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            save_state(path, step + 1, time.time() - start, vae, optimizer, schedule)
    return normalised(vae.eval(), config)


@torch.no_grad()
def normalised(vae: AutoencoderKL, config: VaeConfig) -> AutoencoderKL:
    """Sets shift_factor and scaling_factor so that pipeline latents have mean 0 and deviation 1."""
    scenes = training_scenes(np.random.default_rng((config.seed, -1 % 2**32)), config.statistics_images)
    latents = torch.cat(
        [
            vae.encode(to_tensor(render_many(scenes[i : i + 256]))).latent_dist.sample()
            for i in range(0, len(scenes), 256)
        ]
    )
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae


if __name__ == "__main__":
    train_vae(VaeConfig())
