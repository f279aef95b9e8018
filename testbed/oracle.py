"""Reads a picture of shapes without knowing the scene, and scores it against a prompt's reference.

Only numpy and scipy. Every function takes any uint8 image and never raises on one: a picture it cannot read
yields an empty reading. Images are brought to about 64 pixels before they are read; positions and sizes in a
reading are in units of 1/64 of the shorter side of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
from scipy import ndimage

from testbed.render import SUPERSAMPLE, inside
from testbed.scenes import BACKGROUNDS, CANVAS, COLOURS, SHAPES

_NAMES = (*COLOURS, *BACKGROUNDS)
_PALETTE = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float32)
_EIGHT = np.ones((3, 3), bool)

MIN_AREA = 40  # pixels; the smallest true object (a cross of half extent 7) has about 108
MAX_OBJECTS = 4
COLOUR_REACH = 90.0  # RGB distance at which a pixel no longer shows its palette colour
LEGIBLE = 0.5  # confidence from which an object counts as recognised
PRESENT = 0.15  # confidence from which an object counts as there at all
SMALL_BELOW, LARGE_ABOVE = 10.5, 12.5  # half extents


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A recognised object: centre and half extent in 1/64 of the image, confidence in [0, 1]."""

    shape: str
    colour: str
    size: float
    x: float
    y: float
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """All that the oracle sees; `background` is None where the border shows none of the three."""

    background: str | None
    objects: tuple[Seen, ...]
    sharpness: float
    cleanness: float
    composition: float

    @property
    def quality(self) -> float:
        return self.sharpness * self.cleanness

    @property
    def legible(self) -> bool:
        return any(seen.confidence >= LEGIBLE for seen in self.objects)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Which attributes of a reference hold."""

    attributes: dict[str, bool]

    @property
    def alignment(self) -> float:
        return sum(self.attributes.values()) / max(1, len(self.attributes))

    @property
    def exact(self) -> bool:
        return all(self.attributes.values())


@dataclass(frozen=True, kw_only=True)
class Score(Checked):
    """What holds of a reference. Attribute names end in .colour, .shape, .size, or are relation,
    background, count; "extra1.colour" and so on never hold. `alignment`, `quality` and `composition` lie in [0, 1]."""

    quality: float
    composition: float
    legible: bool


@dataclass(frozen=True)
class ShapesOracle:
    """The oracle as a reward: media uint8 [F, H, W, 3] and a prompt record with `.reference`.

    A video is judged by its last frame. Raises ValueError for media of another form.
    """

    def __call__(self, media: np.ndarray, prompt: Any) -> dict[str, float]:
        media = np.asarray(media)
        if media.ndim != 4 or media.shape[-1] != 3 or not len(media):
            raise ValueError(f"expected uint8 [F, H, W, 3], got {media.shape}")
        result = score(media[-1], prompt.reference)
        return {
            "oracle": result.alignment,
            "exact": float(result.exact),
            "quality": result.quality,
            "composition": result.composition,
            "legible": float(result.legible),
        }


def read(image: np.ndarray) -> Reading:
    """Reads a uint8 image [H, W, 3]. Raises ValueError for another form or type."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 [H, W, 3], got {image.dtype} {image.shape}")
    if min(image.shape[:2]) < 8:
        return Reading(background=None, objects=(), sharpness=0.0, cleanness=0.0, composition=0.0)
    pixels, scale = _shrink(image)
    labels, distance = _classify(pixels)
    background = _background(labels, distance)
    objects = _objects(labels, distance, background, scale)
    sharpness, cleanness = _quality(pixels, labels, distance)
    bounds = CANVAS * np.array([image.shape[1], image.shape[0]]) / min(image.shape[:2])
    return Reading(
        background=_NAMES[background] if background is not None else None,
        objects=objects,
        sharpness=sharpness,
        cleanness=cleanness,
        composition=_composition(objects, bounds),
    )


def _shrink(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Float pixels with a shorter side near 64, and how many reading units one pixel of them measures."""
    factor = max(1, round(min(image.shape[:2]) / CANVAS))
    if factor > 1:
        height, width = (n // factor for n in image.shape[:2])
        blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
        image = blocks.mean((1, 3))
    # A very long image is not a picture of the testbed; cropping it bounds the work.
    image = image[: 4 * CANVAS, : 4 * CANVAS]
    return image.astype(np.float32), CANVAS / min(image.shape[:2])


def _classify(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest palette entry of each pixel [H, W] and the RGB distance to it [H, W]."""
    flat = pixels.reshape(-1, 3)
    squared = (flat**2).sum(1)[:, None] - 2 * flat @ _PALETTE.T + (_PALETTE**2).sum(1)
    labels = squared.argmin(1)
    nearest = np.take_along_axis(squared, labels[:, None], 1)[:, 0]
    return labels.reshape(pixels.shape[:2]), np.sqrt(np.maximum(nearest, 0)).reshape(pixels.shape[:2])


def _border(field: np.ndarray, width: int = 2) -> np.ndarray:
    return np.concatenate(
        [field[:width].ravel(), field[-width:].ravel(), field[:, :width].ravel(), field[:, -width:].ravel()]
    )


def _background(labels: np.ndarray, distance: np.ndarray) -> int | None:
    """The palette index that holds most of the border, if it is a background and truly that colour."""
    border, far = _border(labels), _border(distance)
    counts = np.bincount(border, minlength=len(_NAMES))
    winner = int(counts.argmax())
    is_plain = winner >= len(COLOURS) and 2 * counts[winner] > len(border)
    return winner if is_plain and far[border == winner].mean() < COLOUR_REACH / 2 else None


def _objects(labels: np.ndarray, distance: np.ndarray, background: int | None, scale: float) -> tuple[Seen, ...]:
    """Confident connected regions of one colour, the largest first."""
    found = []
    solid = distance < COLOUR_REACH
    foreground = labels != background if background is not None else labels < len(COLOURS)
    for colour in np.flatnonzero(np.bincount(labels.ravel(), minlength=len(_NAMES))[: len(COLOURS)] >= MIN_AREA):
        for mask in _regions((labels == colour) & solid):
            seen = _recognise(mask, foreground, distance, int(colour), scale)
            if seen is not None and seen[1].confidence >= PRESENT:
                found.append(seen)
    found.sort(key=lambda pair: -pair[0])
    return tuple(seen for _, seen in found[:MAX_OBJECTS])


def _regions(mask: np.ndarray) -> Iterator[np.ndarray]:
    """The connected regions of a mask that are more than slivers."""
    labelled: Any = ndimage.label(mask, _EIGHT)
    numbered, count = labelled
    areas = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    for index in np.argsort(-areas)[:MAX_OBJECTS]:
        if areas[index] < MIN_AREA:
            return
        region = numbered == index + 1
        # The seam between an object and its background can take a third colour, one or two pixels wide.
        if ndimage.binary_erosion(region, _EIGHT).sum() >= 4:
            yield region


def _recognise(
    mask: np.ndarray, foreground: np.ndarray, distance: np.ndarray, colour: int, scale: float
) -> tuple[int, Seen] | None:
    """(area, what the region shows); None for one far from square or as large as the image."""
    # Its own blended edge belongs to the object, whatever colour that edge was taken for.
    whole = ndimage.binary_dilation(mask, _EIGHT) & foreground
    rows, cols = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
    top, left, height, width = rows[0], cols[0], rows[-1] - rows[0] + 1, cols[-1] - cols[0] + 1
    aspect = min(height, width) / max(height, width)
    if aspect < 0.6 or min(mask.shape) in (height, width):  # a region across the whole image is no object
        return None
    patch = whole[top : top + height, left : left + width]
    shape, fit, lead = _match(patch)
    colour_fit = 1 - float(distance[mask].mean()) / COLOUR_REACH
    confidence = _ramp(fit, 0.6, 0.85) * _ramp(lead, 0.0, 0.1) * _ramp(aspect, 0.6, 0.8) * _ramp(colour_fit, 0, 0.5)
    seen = Seen(
        shape=shape,
        colour=_NAMES[colour],
        size=float(height + width - 1) / 4 * scale,
        x=float(left + width / 2) * scale,
        y=float(top + height / 2) * scale,
        confidence=confidence,
    )
    return int(mask.sum()), seen


def _ramp(value: float, low: float, high: float) -> float:
    return float(min(1.0, max(0.0, (value - low) / (high - low))))


def _match(patch: np.ndarray) -> tuple[str, float, float]:
    """The best template of a cropped mask, its IoU and its lead over the runner-up."""
    templates = _templates(*patch.shape)
    both = (templates & patch).sum((1, 2))
    fits = both / np.maximum(1, (templates | patch).sum((1, 2)))
    order = np.argsort(-fits)
    return SHAPES[order[0]], float(fits[order[0]]), float(fits[order[0]] - fits[order[1]])


@lru_cache(maxsize=4096)
def _templates(height: int, width: int) -> np.ndarray:
    """All shapes drawn to fill a box: bool [shape, height, width]."""
    v, u = (2 * (np.arange(n * SUPERSAMPLE) + 0.5) / (n * SUPERSAMPLE) - 1 for n in (height, width))
    fine = np.stack([inside(shape, u[None], v[:, None]) for shape in SHAPES])
    return fine.reshape(len(SHAPES), height, SUPERSAMPLE, width, SUPERSAMPLE).mean((2, 4)) >= 0.5


def _quality(pixels: np.ndarray, labels: np.ndarray, distance: np.ndarray) -> tuple[float, float]:
    """Sharpness (few half-way pixels per pixel of outline) and cleanness (flat areas are flat)."""
    inner = np.ones(labels.shape, bool)
    across, down = labels[:, 1:] == labels[:, :-1], labels[1:] == labels[:-1]
    inner[:, 1:] &= across
    inner[:, :-1] &= across
    inner[1:] &= down
    inner[:-1] &= down
    outline = max(1, int((~inner).sum()))
    soft = int((distance > 30).sum())
    sharpness = 1 - _ramp(soft / (outline + 8), 1.0, 3.0)
    flat = inner & ndimage.binary_erosion(inner, _EIGHT, border_value=1)
    if not flat.any():
        return sharpness, 0.0
    steps = np.abs(np.diff(pixels, axis=1)).mean(2)[flat[:, 1:] & flat[:, :-1]]
    roughness = float(steps.mean()) if steps.size else 255.0
    # Flat areas only exist where labels agree, so their share guards against all-over noise.
    return sharpness, (1 - _ramp(roughness, 1.5, 12.0)) * _ramp(float(flat.mean()), 0.1, 0.5)


def _composition(objects: tuple[Seen, ...], bounds: np.ndarray) -> float:
    """How well objects are set: clear of the border, neither tiny nor huge, near the middle as a group."""
    if not objects:
        return 0.0
    boxes = np.array([(s.x, s.y, s.size) for s in objects])
    nearest = np.minimum(boxes[:, :2], bounds - boxes[:, :2]).min(1) - boxes[:, 2]
    margins = np.clip(nearest / 4, 0, 1).mean()
    sizes = np.mean([_ramp(s, 4, 7) * (1 - _ramp(s, 19, 28)) for s in boxes[:, 2]])
    shift = np.abs(boxes[:, :2].mean(0) / bounds - 0.5).max()
    return float(margins * sizes * (1 - 0.5 * _ramp(float(shift), 0.1, 0.4)))


def score(image: np.ndarray, reference: Mapping[str, Any]) -> Score:
    """Scores a uint8 image [H, W, 3] against a reference (see `scenes.reference`).

    Described objects are paired with seen ones so that most of their own attributes hold. The relation only
    counts where both partners have their colour or their shape right: else it would say nothing. An object that
    nobody asked for is wrong in colour and in shape; otherwise it would pay to draw one of everything.
    Raises ValueError for a malformed image and KeyError for a malformed reference.
    """
    reading = read(image)
    present = tuple(seen for seen in reading.objects if seen.confidence >= PRESENT)
    wanted = reference["objects"]
    padded = (*present, *(None,) * len(wanted))
    options = (_attributes(reference, chosen) for chosen in dict.fromkeys(permutations(padded, len(wanted))))
    best = max(options, key=lambda held: (_own(held), sum(held.values())))
    attributes = best | {
        "background": reading.background == reference["background"],
        "count": len(present) == len(wanted),
    }
    for i in range(1, len(present) - len(wanted) + 1):
        attributes |= {f"extra{i}.colour": False, f"extra{i}.shape": False}
    return Score(
        attributes=attributes,
        quality=reading.quality,
        composition=reading.composition,
        legible=reading.legible,
    )


def _own(held: Mapping[str, bool]) -> int:
    return sum(value for name, value in held.items() if name != "relation")


def _attributes(reference: Mapping[str, Any], chosen: tuple[Seen | None, ...]) -> dict[str, bool]:
    """Which attributes of the objects, and of their relation, hold for one pairing."""
    held: dict[str, bool] = {}
    for i, (thing, seen) in enumerate(zip(reference["objects"], chosen, strict=True), start=1):
        held[f"object{i}.colour"] = seen is not None and seen.colour == thing["colour"]
        held[f"object{i}.shape"] = seen is not None and seen.shape == thing["shape"]
        if thing.get("size"):
            held[f"object{i}.size"] = seen is not None and size_word(seen.size) == thing["size"]
    if reference.get("relation"):
        known = all(held[f"object{i}.colour"] or held[f"object{i}.shape"] for i in (1, 2))
        held["relation"] = known and relation_holds(reference["relation"], chosen[0], chosen[1])
    return held


def size_word(size: float) -> str | None:
    """The word for a half extent; None between small and large."""
    return "small" if size <= SMALL_BELOW else "large" if size >= LARGE_ABOVE else None


def relation_holds(relation: str, first: Seen | None, second: Seen | None) -> bool:
    """Whether `first` stands in `relation` to `second`, mainly along the axis of the relation."""
    if first is None or second is None:
        return False
    dx, dy = second.x - first.x, second.y - first.y
    if relation in ("right of", "below"):
        dx, dy = -dx, -dy
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return along > abs(across)
