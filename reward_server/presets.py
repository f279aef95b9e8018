"""What each released judge wants from the server: data, read by ``serve``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How one judge is served; the defaults suit any Qwen3-VL of about 8B parameters."""

    model: str = ""
    """Hub id of the released checkpoint."""
    family: str = "flex"
    """How it is asked: a name of ``ask.FAMILIES``."""
    tensor_parallel: int = 1
    """GPUs of one replica: an 8B model in bfloat16 is 17 GB, so one of 40 GB or more leaves room for the caches."""
    max_model_len: int = 16384
    """Tokens of a request and its reply. 16 frames of 480×832 are about 6,300, a long reply is 2,000."""
    images: int = 16
    """Most pictures in a request. Videos come as their frames, so 8 + 8, or 16 of one."""
    picture_cache_gb: float = 4.0
    """Processed pictures that the server keeps: a 720×720 picture is 12 MB, and each stands in many pairs."""
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    """Arguments of the chat template where a request gives none."""


PRESETS: Mapping[str, Preset] = {
    "flex-qwen3vl-8b": Preset(model="CodeGoat24/UnifiedReward-Flex-qwen3vl-8b"),
    # Qwen3.5 thinks unless told not to; this judge was trained to answer at once.
    "flex-qwen35-9b": Preset(
        model="CodeGoat24/UnifiedReward-Flex-qwen35-9b", chat_template_kwargs={"enable_thinking": False}
    ),
    "2.0": Preset(model="CodeGoat24/UnifiedReward-2.0-qwen3vl-8b", family="2.0"),
    "think": Preset(model="CodeGoat24/UnifiedReward-Think-qwen3vl-8b", family="think"),
    # Source, two edits; each is shown once, so there is less to keep.
    "edit": Preset(model="CodeGoat24/UnifiedReward-Edit-qwen3vl-8b", family="edit", images=3, picture_cache_gb=2.0),
}


def preset_of(name: str, model: str) -> Preset:
    """The preset with this name; without a name the one released as ``model``, or the defaults."""
    if name:
        return PRESETS[name]
    return next((p for p in PRESETS.values() if p.model == model), Preset())
