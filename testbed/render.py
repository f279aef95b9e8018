"""Anti-aliased drawing of scenes with numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from testbed.scenes import BACKGROUNDS, CANVAS, COLOURS, Obj, Scene

SUPERSAMPLE = 4


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points lie in a shape whose bounding box is [-1, 1] x [-1, 1], v downwards.

    Args:
        shape: One of `scenes.SHAPES`; KeyError otherwise.
        u, v: Coordinates that broadcast against each other.

    Returns:
        bool of the broadcast form.
    """
    return _SHAPE_TESTS[shape](u, v)


_SHAPE_TESTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 1,
    "triangle": lambda u, v: (2 * abs(u) <= 1 + v) & (abs(v) <= 1),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 1 / 3) & (np.maximum(abs(u), abs(v)) <= 1),
}


def render(scene: Scene, size: int = CANVAS) -> np.ndarray:
    """Draws a scene: uint8 [size, size, 3]. `size` other than 64 scales the whole canvas."""
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for obj in scene.objects:
        _draw(image, obj, size / CANVAS)
    return np.rint(image).astype(np.uint8)


def render_many(scenes: Sequence[Scene]) -> np.ndarray:
    """Draws scenes in bulk: uint8 [n, 64, 64, 3]."""
    images = np.empty((len(scenes), CANVAS, CANVAS, 3), np.uint8)
    for i, scene in enumerate(scenes):
        images[i] = render(scene)
    return images


def _draw(image: np.ndarray, obj: Obj, scale: float) -> None:
    """Blends one object into a float image [H, W, 3] in place, touching only its bounding box."""
    radius, x, y = obj.size * scale, obj.x * scale, obj.y * scale
    rows, cols = (_span(c, radius, n) for c, n in ((y, image.shape[0]), (x, image.shape[1])))
    v, u = ((_fine(span) - c) / radius for span, c in ((rows, y), (cols, x)))
    fine = inside(obj.shape, u[None, :], v[:, None])
    k = SUPERSAMPLE
    cover = fine.reshape(len(v) // k, k, len(u) // k, k).mean((1, 3))[..., None]
    patch = image[rows, cols]
    patch += cover * (np.array(COLOURS[obj.colour], np.float32) - patch)


def _span(centre: float, radius: float, limit: int) -> slice:
    return slice(max(0, int(centre - radius)), min(limit, int(np.ceil(centre + radius)) + 1))


def _fine(span: slice) -> np.ndarray:
    """Sub-pixel sample positions of a span of pixels."""
    return span.start + (np.arange((span.stop - span.start) * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
