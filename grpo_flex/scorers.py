"""Rewards that need no judge server: any callable, and the CLIP family through transformers.

A scorer looks at one sibling at a time and says how good it is, higher is better. ``RunConfig.scorers`` gives each a
Ray actor of its own; what it says enters a group's verdicts as ``Verdict(members=(i,), scores={name: (value,)})``, so
that ``rewards.Pointwise`` reads it and ``rewards.Several`` sets it beside a judge's win rates. The same objects serve
as ``evaluation.scorer``.

Nothing here imports torch or transformers before a scorer is first used.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from grpo_flex.types import Prompt, Verdict
from reward_server.families.chat import frame_indices

if TYPE_CHECKING:
    from torch import Tensor

IMAGES_AT_ONCE = 64
"""Pictures in one forward pass: bounds the memory of a group of long clips."""
LAION_SIZES = ((1,), (1024, 128, 64, 16, 1))
"""Output sizes of the layers of LAION's two aesthetic predictors, v1 (linear) and v2; neither has activations."""


class Scorer(Protocol):
    """A callable that config.json can name: a frozen dataclass, or a function, of an importable module.

    Two things are optional. ``load()`` is called once before training starts, and what it raises as a ValueError is
    the user's message; ``batch(media_G, prompt)`` scores the siblings of a prompt together, one mapping for each.
    A ``name`` tells two scorers of one class apart.
    """

    def __call__(self, media: np.ndarray, prompt: Prompt) -> Mapping[str, float]:
        """Numbers by name for uint8 [F, H, W, 3]; higher is better. What it raises masks the sibling."""
        ...


def label(scorer: Any) -> str:
    """What a scorer is called in logs and messages: its ``name``, else its class or function."""
    own = getattr(scorer, "name", None) or getattr(scorer, "__name__", None)
    return str(own or type(scorer).__name__)


# ---------------------------------------------------------------- scoring a group


def score_group(scorer: Scorer, media_G: Sequence[np.ndarray], prompt: Prompt) -> list[Verdict]:
    """One verdict for each sibling; never raises.

    A sibling that could not be scored, or got a number that is not finite, is "failed" with a named problem. A
    scorer with ``batch`` that raises fails for all of them.
    """
    began = time.perf_counter()
    together: Callable[..., Any] | None = getattr(scorer, "batch", None)
    if together is None:
        given = [_attempt(scorer, media, prompt) for media in media_G]
    else:
        given = _dealt(_attempt(together, list(media_G), prompt), len(media_G))
    seconds = (time.perf_counter() - began) / max(1, len(media_G))
    return [_verdict(i, found, label(scorer), seconds) for i, found in enumerate(given)]


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or the exception that it raised."""
    try:
        return function(*arguments)
    except Exception as error:  # the callable is the user's: whatever it raises masks its sibling, never ends the run
        return error


def _dealt(found: Any, siblings: int) -> list[Any]:
    if isinstance(found, Exception):
        return [found] * siblings
    if not isinstance(found, Sequence) or len(found) != siblings:
        return [
            ValueError(f"batch() needs to give {siblings} mappings, one for each sibling, not {found!r}")
        ] * siblings
    return list(found)


def _verdict(sibling: int, found: Any, scorer: str, seconds: float) -> Verdict:
    problem, detail = _complaint(found)
    if problem:
        return Verdict(
            members=(sibling,), status="failed", problem=problem, rationale=detail, scorer=scorer, seconds=seconds
        )
    scores = {str(name): (float(value),) for name, value in found.items()}
    return Verdict(members=(sibling,), status="ok", scores=scores, scorer=scorer, seconds=seconds)


def _complaint(found: Any) -> tuple[str, str]:
    """(problem, what there is to say of it) of a scorer's answer; ("", "") for a good one."""
    if isinstance(found, Exception):
        return type(found).__name__, str(found)[:500]
    if not isinstance(found, Mapping) or not found:
        return "no mapping of numbers", repr(found)[:500]
    try:
        finite = all(math.isfinite(value) for value in found.values())
    except Exception:  # whatever the user's numbers are, such as a tensor of several
        return "no mapping of numbers", repr(found)[:500]
    return ("", "") if finite else ("not finite", repr(found)[:500])


def scorer_metrics(groups: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    """``scorer/…`` figures of a step from each group's scores: how many, how many masked and why, mean by name."""
    verdicts = [v for group in groups for v in group]
    if not verdicts:
        return {}
    failed = [v for v in verdicts if v.status != "ok"]
    found = {
        "scorer/verdicts": float(len(verdicts)),
        "scorer/failed": float(len(failed)),
        "scorer/masked_share": len(failed) / len(verdicts),
        "scorer/seconds_per_sibling": float(np.mean([v.seconds for v in verdicts])),
    }
    problems = Counter(v.problem for v in failed)
    found |= {f"scorer/problem/{name.replace(' ', '_')}": float(n) for name, n in sorted(problems.items())}
    values: defaultdict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        for name, scores in verdict.scores.items():
            values[name] += scores
    return found | {f"scorer/{name}_mean": float(np.mean(given)) for name, given in values.items()}


# ---------------------------------------------------------------- the CLIP family


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """What the scorers on a CLIP checkpoint share: pictures in, one number for each; a clip's is its frames' mean."""

    model: str
    """A folder with a saved CLIPModel, or a Hugging Face Hub id."""
    processor: str = ""
    """Where tokeniser and picture processor come from; empty: the model itself."""
    frames: int = 8
    """Uniformly spaced frames of a clip that are scored, first and last included."""
    dtype: str = "float32"
    device: str = "auto"
    """auto: a GPU where the process sees one."""

    def problems(self) -> Iterator[tuple[str, str]]:
        for field in ("model", "processor"):
            value = getattr(self, field)
            if value.startswith((".", "/", "~")) and not Path(value).is_dir():
                yield field, f"is {value!r}, which is no folder here; give the folder of a saved CLIPModel, or a Hub id"
        if not self.model:
            yield "model", "is empty; give the folder of a saved CLIPModel, or a Hub id"
        if self.frames < 1:
            yield "frames", f"is {self.frames}; it needs at least 1"
        if self.dtype not in ("float32", "bfloat16", "float16"):
            yield "dtype", f"is {self.dtype!r}; it needs to be float32, bfloat16 or float16"

    def load(self) -> None:
        """Load the model now instead of with the first picture.

        Raises:
            ValueError: no such model, a hub that cannot be reached, or a checkpoint that is no CLIP model.
        """
        self._clip()

    def __call__(self, media: np.ndarray, prompt: Prompt) -> dict[str, float]:
        """The score of uint8 [F, H, W, 3]."""
        return self.batch([media], prompt)[0]

    def batch(self, media_G: Sequence[np.ndarray], prompt: Prompt) -> list[dict[str, float]]:
        """The same for all siblings of a prompt, together."""
        import torch

        frames = [[media[i] for i in frame_indices(len(media), self.frames)] for media in media_G]
        pictures = [np.ascontiguousarray(picture) for clip in frames for picture in clip]
        with torch.no_grad():
            values = torch.cat([self._values(p, prompt.text) for p in _slices(pictures, IMAGES_AT_ONCE)])
        means = [float(part.double().mean()) for part in values.split([len(clip) for clip in frames])]
        return [{label(self): mean} for mean in means]

    def _clip(self) -> LoadedClip:
        return load_clip(self.model, self.processor or self.model, self.dtype, self.device)

    def _values(self, pictures: Sequence[np.ndarray], text: str) -> Tensor:
        """[B]: one number for each uint8 [H, W, 3]."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ClipScore(_Clip):
    """Cosine of picture and prompt in CLIP's space, -1 to 1 (CLIPScore, arXiv 2104.08718, without its factor 2.5)."""

    model: str = "openai/clip-vit-large-patch14"
    name: str = "clip"

    def _values(self, pictures: Sequence[np.ndarray], text: str) -> Tensor:
        clip = self._clip()
        return clip.images(pictures) @ clip.text(text)


@dataclass(frozen=True, kw_only=True)
class PickScore(ClipScore):
    """Cosine times the model's own scale, about 15 to 25, from a CLIP trained on people's picks (arXiv 2305.01569)."""

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    name: str = "pickscore"

    def _values(self, pictures: Sequence[np.ndarray], text: str) -> Tensor:
        return super()._values(pictures, text) * self._clip().scale


@dataclass(frozen=True, kw_only=True)
class HpsV2(ClipScore):
    """Human Preference Score v2 (arXiv 2306.09341): cosine, about 0.2 to 0.35.

    The authors publish an open_clip file; the default is a conversion of it to transformers' format.
    """

    model: str = "adams-story/HPSv2-hf"
    processor: str = "openai/clip-vit-base-patch32"
    name: str = "hpsv2"


@dataclass(frozen=True, kw_only=True)
class Aesthetic(_Clip):
    """LAION's aesthetic predictor: linear layers on the normalised picture embedding, about 1 to 10; no prompt."""

    model: str = "openai/clip-vit-large-patch14"
    head: str
    """The predictor's weights, .safetensors or a torch file: e.g. sac+logos+ava1-l14-linearMSE.pth (v2) or
    sa_0_4_vit_l_14_linear.pth (v1), both for the default model."""
    name: str = "aesthetic"
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors", ".pth", ".pt", ".bin")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not Path(self.head).is_file() or not self.head.endswith(self.suffixes):
            yield "head", f"is {self.head!r}; it needs to be a file here that ends in {', '.join(self.suffixes)}"

    def load(self) -> None:
        super().load()
        self._layers()

    def _layers(self) -> tuple[tuple[Tensor, Tensor], ...]:
        clip = self._clip()
        return load_head(self.head, clip.width, self.model, str(clip.device))

    def _values(self, pictures: Sequence[np.ndarray], text: str) -> Tensor:
        x = self._clip().images(pictures).float()
        for weight, bias in self._layers():
            x = x @ weight.T + bias
        return x[:, 0]


def _slices(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class LoadedClip:
    """A CLIPModel with its processor; embeddings have length 1."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self.model, self.processor, self.device = model.to(device).eval().requires_grad_(False), processor, device
        self.width: int = model.config.projection_dim
        self.text = lru_cache(maxsize=64)(self._text)  # the frames of a clip may come in several batches

    @property
    def scale(self) -> Tensor:
        return self.model.logit_scale.exp()

    def images(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """[B, D] of uint8 [H, W, 3] each."""
        pixels = self.processor(images=list(pictures), return_tensors="pt", input_data_format="channels_last")
        found = self.model.get_image_features(pixels["pixel_values"].to(self.device, self.model.dtype))
        return _unit(found.pooler_output)

    def _text(self, text: str) -> Tensor:
        """[D]; a text beyond the model's length (77 tokens) is cut off."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.processor(text=[text], return_tensors="pt", truncation=True, max_length=limit)
        found = self.model.get_text_features(
            tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
        )
        return _unit(found.pooler_output)[0]


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@lru_cache(maxsize=8)
def load_clip(model: str, processor: str, dtype: str, device: str) -> LoadedClip:
    """A CLIP checkpoint, once for a process.

    Raises:
        ValueError: no such model, a hub that cannot be reached, or a checkpoint that is no CLIP model.
    """
    import torch
    from transformers import CLIPModel, CLIPProcessor

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_is_clip(model)
    try:
        both: Any = CLIPModel.from_pretrained(model, dtype=getattr(torch, dtype), output_loading_info=True)
        prepared = CLIPProcessor.from_pretrained(processor)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(_cannot_load(f"{model!r} (processor {processor!r})", error)) from error
    loaded, info = both
    if info["missing_keys"]:
        raise ValueError(
            f"the CLIP model {model!r} lacks {len(info['missing_keys'])} of its weights, e.g. {min(info['missing_keys'])}: "
            "its scores would be noise; give a complete checkpoint in transformers' format"
        )
    return LoadedClip(loaded, prepared, device)


def _check_is_clip(model: str) -> None:
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(model).model_type
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_cannot_load(repr(model), error)) from error
    if kind != "clip":
        raise ValueError(f"{model!r} holds a model of type {kind!r}; this scorer needs one of type 'clip'")


def _cannot_load(what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400]
    return (
        f"the CLIP model {what} cannot be loaded: {reason}\n"
        "Give a folder written by CLIPModel.save_pretrained and CLIPProcessor.save_pretrained, or a Hub id that this "
        "machine can reach; without a line to the Hub, download the model elsewhere and pass its path."
    )


@lru_cache(maxsize=8)
def load_head(path: str, width: int, model: str, device: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """(weight [out, in], bias [out]) of each linear layer of an aesthetic predictor, in order, float32.

    Args:
        width: D of the embeddings that it gets.
        model: Whose embeddings those are, for the message.

    Raises:
        ValueError: no readable file of weights, or layers of other sizes than LAION's predictors have.
    """
    state = _read_tensors(path)
    names = sorted((n.removesuffix("weight") for n in state if n.endswith("weight")), key=_layer_number)
    try:
        layers = tuple((state[f"{n}weight"].float().to(device), state[f"{n}bias"].float().to(device)) for n in names)
    except KeyError as error:
        raise ValueError(
            f"the head {path!r} has no {error}; each of its linear layers needs weight and bias"
        ) from error
    sizes = [tuple(weight.shape) for weight, _ in layers]
    known = [list(zip(outs, (width, *outs), strict=False)) for outs in LAION_SIZES]
    if sizes not in known:
        found = " → ".join(map(str, [size[-1] for size in sizes] + [sizes[-1][0]])) if sizes else "no layer"
        raise ValueError(
            f"the head {path!r} has layers of other sizes ({found}) than an aesthetic predictor on the {width} numbers "
            f"of {model!r}: {width} → 1, or {width} → 1024 → 128 → 64 → 16 → 1; give the head that was trained on this model"
        )
    return layers


def _layer_number(name: str) -> int:
    """Of "layers.4." 4; LAION's first predictor is a bare layer."""
    digits = [part for part in name.split(".") if part.isdigit()]
    return int(digits[-1]) if digits else 0


def _read_tensors(path: str) -> Mapping[str, Tensor]:
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"the head {path!r} is no readable file of weights: {' '.join(str(error).split())[:300]}"
        ) from error
