"""Trains the testbed's AutoencoderKLWan on moving shapes (9 x 48 x 48 pixels to 3 x 6 x 6 latents of 8 channels).

`python -m testbed.train_wan_vae` resumes from `testbed/.build`, trains what is missing (first on all clips, then mostly
on those that are hardest), and says how well reconstructions of clips that it has not seen are read.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false, reportOptionalSubscript=false
# diffusers and transformers annotate configurations by their defaults and results by their tuple form.
from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from testbed.clips import render_clips, training_clips
from testbed.training import BUILD, Course, train

AUTOENCODER, SHARPENED = BUILD / "wan_vae.pt", BUILD / "wan_vae_sharp.pt"
COURSE = Course(steps=4800, peak_lr=2e-3, warm_up=0.1, fall=100, betas=(0.9, 0.999), weight_decay=1e-4)
SHARP_COURSE = Course(steps=1600, peak_lr=1e-3, warm_up=0.1, fall=100, betas=(0.9, 0.999), weight_decay=1e-4)
CHANNELS, PATCH = 8, 2


@dataclass(frozen=True, kw_only=True)
class WanVaeConfig:
    """Hyper-parameters; `kl` weighs the mean KL of a latent element (nats) against pixel errors, `foreground` a pixel of
    an object against one of the background (`sharp_foreground` in `sharpen`, where a share `gray` of the clips is gray).

    For the first `rotated` of the steps, half of the clips have rotated colours (see `rotate_colours`).
    """

    seed: int = 31
    threads: int = 1
    course: Course = COURSE
    batch: int = 8
    kl: float = 5e-4
    foreground: float = 2.0
    rotated: float = 0.375
    sharp_course: Course = SHARP_COURSE
    sharp_foreground: float = 4.0
    gray: float = 0.75
    statistics_clips: int = 1024


def new_vae() -> AutoencoderKLWan:
    """The untrained autoencoder, about 0.7 M parameters, begun so that it learns quickly.

    As in Wan2.2's own autoencoder, pixels are folded 2 x 2 into channels before the first convolution, and blocks have
    shortcuts around their resampling. Without the folding, the layers at full resolution take most of the time, and
    training on a CPU is ten times slower; without the shortcuts, objects were still gray after 400 steps.
    """
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        is_residual=True,
        temperal_downsample=[True, True],
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_spatial=4 * PATCH,
        scale_factor_temporal=4,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    with torch.no_grad():
        # A fresh posterior has deviation 1 about means near 0, which drowns what the encoder says; begin with e^-3.
        vae.quant_conv.bias[CHANNELS:] = -6.0
        # Residual branches begin at nothing, so that the first steps train a nearly linear network.
        for name, parameter in vae.named_parameters():
            if ".conv2." in name:
                parameter.zero_()
    return vae


def to_tensor(clips: np.ndarray) -> torch.Tensor:
    """uint8 [n, F, H, W, 3] to float32 [n, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_uint8(clips: torch.Tensor) -> np.ndarray:
    """float [n, 3, F, H, W] in [-1, 1] to uint8 [n, F, H, W, 3]."""
    scaled = ((clips.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def rotate_colours(clips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turns the colours of the first half of clips [n, 3, F, H, W] by a random rotation each, somewhat shrunk to fit.

    The world's backgrounds are gray, so nearly all the variance of its pixels is brightness, and an autoencoder is slow
    to see that there are colours at all. Rotated, backgrounds differ in colour as well.
    """
    turned = clips.clone()
    half = len(clips) // 2
    rotations, _ = torch.linalg.qr(torch.randn(half, 3, 3, generator=generator))
    turned[:half] = 0.6 * torch.einsum("nij,njfhw->nifhw", rotations, clips[:half])
    return turned


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """What `vae.decode` gives before it clamps to [-1, 1]: a clamped pixel would have no gradient to come back by."""
    vae.clear_cache()
    features, frames = vae.post_quant_conv(latents), []
    for k in range(latents.shape[2]):
        # Convolutions are causal: each latent frame is decoded with the cached end of the one before.
        frames.append(
            vae.decoder(features[:, :, k : k + 1], feat_cache=vae._feat_map, feat_idx=[0], first_chunk=k == 0)
        )
    vae.clear_cache()
    return unfold(torch.cat(frames, 2))


def unfold(folded: torch.Tensor) -> torch.Tensor:
    """[n, 3 p p, F, H, W] to [n, 3, F, H p, W p], in the order in which the autoencoder folds its pixels."""
    n, _, frames, height, width = folded.shape
    cells = folded.view(n, 3, PATCH, PATCH, frames, height, width)  # colour, column in cell, row in cell
    return cells.permute(0, 1, 4, 5, 3, 6, 2).reshape(n, 3, frames, height * PATCH, width * PATCH)


def vae_loss(vae: AutoencoderKLWan, clips: torch.Tensor, config: WanVaeConfig, foreground: float) -> torch.Tensor:
    """Pixel error (shapes weigh more than background, lest small colours drown) plus a small KL."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(clips).latent_dist
        output = decode_unclamped(vae, posterior.sample())
    error = output.float() - clips
    background = clips[:, :, :, :1, :1]  # objects keep a margin, so the corner is always background
    weight = 1 + foreground * ((clips - background).abs().amax(1, keepdim=True) > 0.05)
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return (weight * (error.abs() + 2 * error**2)).mean() + config.kl * kl


def train_vae(config: WanVaeConfig) -> AutoencoderKLWan:
    """Trains, or resumes, and returns the autoencoder with its latents' means and deviations set."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    vae = new_vae()

    def loss_of(step: int) -> torch.Tensor:
        clips = to_tensor(render_clips(training_clips(np.random.default_rng((config.seed, step)), config.batch)))
        if step < config.rotated * config.course.steps:
            clips = rotate_colours(clips, torch.Generator().manual_seed(step))
        return vae_loss(vae, clips, config, config.foreground)

    return normalised(sharpen(train(AUTOENCODER, vae, loss_of, config.course), config), config)


def sharpen(vae: AutoencoderKLWan, config: WanVaeConfig) -> AutoencoderKLWan:
    """Trains the whole on, or resumes, mostly on clips with a gray background.

    Gray has the least contrast to every colour and so the least part in the loss: before this, three in five clips with
    a gray background were read wrongly from their reconstructions, of the others one in sixty.
    """
    vae.train().requires_grad_(True)

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng((config.seed, config.course.steps + step))
        drawn = training_clips(rng, 4 * config.batch)
        drawn.sort(key=lambda clip: clip.description.background != "gray")  # stable: the gray ones come first
        gray = round(config.gray * config.batch)
        return vae_loss(
            vae, to_tensor(render_clips(drawn[:gray] + drawn[gray - config.batch :])), config, config.sharp_foreground
        )

    return train(SHARPENED, vae, loss_of, config.sharp_course).eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: np.ndarray, batch: int = 32) -> torch.Tensor:
    """Latents [n, 8, 3, 6, 6] as the pipeline has them, mean 0 and deviation 1, of uint8 clips [n, 9, 48, 48, 3]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = [vae.encode(to_tensor(clips[i : i + batch])).latent_dist.mean for i in range(0, len(clips), batch)]
    mean, std = (torch.tensor(c).view(1, -1, 1, 1, 1) for c in (vae.config.latents_mean, vae.config.latents_std))
    return (torch.cat(parts).float() - mean) / std


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, clips: np.ndarray, batch: int = 32) -> np.ndarray:
    """Encodes and decodes uint8 clips [n, 9, 48, 48, 3]."""
    parts = [
        vae.decode(vae.encode(to_tensor(clips[i : i + batch])).latent_dist.mean).sample
        for i in range(0, len(clips), batch)
    ]
    return to_uint8(torch.cat(parts))


def normalised(vae: AutoencoderKLWan, config: WanVaeConfig) -> AutoencoderKLWan:
    """Sets latents_mean and latents_std so that every channel of pipeline latents has mean 0 and deviation 1."""
    clips = training_clips(np.random.default_rng((config.seed, -1 % 2**32)), config.statistics_clips)
    plain = {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
    vae.register_to_config(**plain)
    std, mean = torch.std_mean(encode(vae, render_clips(clips)), dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=WanVaeConfig.threads)
    vae = train_vae(WanVaeConfig(threads=parser.parse_args().threads))
    from testbed.video_oracle import check_clips, score_clips, summary

    clips = check_clips()
    print(summary(score_clips(reconstruct(vae, render_clips(clips)), clips)))


if __name__ == "__main__":
    main()
