"""Trains the testbed's AutoencoderKL on rendered scenes (64 x 64 pixels to 8 x 8 latents of 8 channels).

`python -m testbed.train_vae` resumes from `testbed/.build/vae.pt` and returns at once when that is complete.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false
# diffusers and transformers annotate configurations by their defaults and results by their tuple form.
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL

from testbed.render import render_many
from testbed.scenes import Scene, canonical, heldout_descriptions, sample_description, sample_scene
from testbed.training import BUILD, Course, train

AUTOENCODER = BUILD / "vae.pt"
COURSE = Course(steps=3000, peak_lr=2e-3, warm_up=0.1, fall=100, betas=(0.9, 0.999), weight_decay=1e-4)


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Hyper-parameters; `kl` weighs the mean KL of a latent element (nats) against pixel errors."""

    seed: int = 11
    threads: int = 2
    course: Course = COURSE
    batch: int = 32
    kl: float = 5e-4
    foreground: float = 2.0
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


def train_vae(config: VaeConfig) -> AutoencoderKL:
    """Trains, or resumes, and returns the autoencoder with its latents' shift and scale set."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    vae = new_vae()

    def loss_of(step: int) -> torch.Tensor:
        scenes = training_scenes(np.random.default_rng((config.seed, step)), config.batch)
        return vae_loss(vae, to_tensor(render_many(scenes)), config)

    return normalised(train(AUTOENCODER, vae, loss_of, config.course).eval(), config)


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
