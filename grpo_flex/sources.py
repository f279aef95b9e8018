"""The picture that an editing prompt edits, as editor and judge see it.

Both are shown the same: the file that the prompt's ``reference["source"]`` names, brought to the sample's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_flex.types import Prompt


def read_source(prompt: Prompt) -> Any:
    """The picture to edit, RGB.

    Raises:
        ValueError: the prompt names none, or it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    path = prompt.reference.get("source")
    if path is None:
        raise ValueError(
            f"prompt {prompt.id!r} has no reference['source']: an editor, and a judge of edits, need the path of the picture "
            "to edit"
        )
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"prompt {prompt.id!r}: its reference['source'] {path!r} cannot be read: {error}") from error


def fitted_source(prompt: Prompt, width: int, height: int) -> Any:
    """The same, scaled until it covers width×height and cut in the middle."""
    from PIL import Image, ImageOps

    return ImageOps.fit(read_source(prompt), (width, height), method=Image.Resampling.LANCZOS)
