"""Readers of published preference sets, in the layout in which each is published.

Where a layout was seen stands with its reader. The sets themselves were not at hand: the readers are tested on files
made in these layouts, and on none of the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from reward_server.preferences import Label, Layout, Place, Preference, our_layout


def genai_bench(row: Mapping[str, Any], place: Place) -> Preference | str:
    """GenAI-Bench (TIGER-Lab/GenAI-Bench on the hub; arXiv 2406.04485), images, edits and videos.

    Seen in TIGER-AI-Lab/GenAI-Bench (`inference.py`, `inference_configs.json`): ``prompt``, ``left_image``,
    ``right_image`` or ``left_video``, ``right_video`` (addresses of mp4 files), for edits ``instruct_prompt``,
    ``source_image``, ``left_output_image``, ``right_output_image``; ``vote_type`` is leftvote, rightvote, tievote or
    bothbad_vote. CodeGoat24/UnifiedReward has the videos as JSON with ``video_left``, ``video_right``, ``id``. Videos are
    looked up by file name in the media folder. A tie and "both bad" are ties. That the hub's Parquet keeps its pictures
    as structs with "bytes" is how `datasets` writes them, not verified on these files.
    """
    label, tie = _vote(row["vote_type"])
    if "left_output_image" in row:
        sides, prompt = ("left_output_image", "right_output_image"), row["instruct_prompt"]
    else:
        names = [("left_image", "right_image"), ("left_video", "right_video"), ("video_left", "video_right")]
        sides, prompt = next((pair for pair in names if pair[0] in row), names[0]), row["prompt"]
    video = "video" in sides[0]
    one, two = (place.of(str(row[s]).rpartition("/")[2] if video else row[s]) for s in sides)
    return Preference(
        id=str(row.get("id", "")),
        prompt=str(prompt),
        candidates=((one,), (two,)),
        label=label,
        tie=tie,
        medium="video" if video else "image",
        source=place.of(row["source_image"]) if "left_output_image" in row else "",
    )


def _vote(vote: object) -> tuple[Label, bool]:
    votes: dict[object, tuple[Label, bool]] = {
        "leftvote": (0, False),
        "rightvote": (1, False),
        "tievote": (None, True),
        "bothbad_vote": (None, True),
    }
    if vote not in votes:
        raise ValueError(f"vote_type is {vote!r}; it needs to be one of {', '.join(map(str, votes))}")
    return votes[vote]


def mmrb2(row: Mapping[str, Any], place: Place) -> Preference | str:
    """Multimodal RewardBench 2: its tasks t2i and edit, JSON as its build script writes it, or the hub's Parquet.

    Seen in facebookresearch/MMRB2 (`benchmark/t2i_response_only.json`, `benchmark/README.md`, `build_from_hf.py`):
    ``{"pairs": [{"id", "prompt_content": [["text", …], ["image", path]], "response_a": {"response_content": …}, "chosen":
    "A" | "B", "prompt_source", "prompt_metadata"}]}``; on the hub (rl-research/multimodal-rewardbench-2) ``pair_id``,
    ``prompt_text``, ``prompt_images``, ``response_a_text``, ``response_a_images``. The README there says ``human_preference``
    for ``chosen``; the files have ``chosen``. Responses that are not exactly one picture, and prompts with several pictures
    (which no family shows), are left out. The category is ``prompt_source``.
    """
    whole = "prompt_content" in row
    if not whole and "prompt_text" not in row:
        raise KeyError("prompt_content (files named *_response_only.json hold no prompts: build the whole ones)")
    if row["chosen"] not in ("A", "B"):
        raise ValueError(f"chosen is {row['chosen']!r}; it needs to be A or B")
    answers = [_content(row, f"response_{k}", whole) for k in "ab"]
    words, shown = _content(row, "prompt", whole)
    if any(len(images) != 1 for _, images in answers):
        return "a response that is not one picture"
    if len(shown) > 1:
        return "several pictures in the prompt"
    one, two = (place.of(images[0]) for _, images in answers)
    return Preference(
        id=str(row.get("id") or row["pair_id"]),
        prompt=words,
        candidates=((one,), (two,)),
        label=0 if row["chosen"] == "A" else 1,
        category=str(row.get("prompt_source") or ""),
        source=place.of(shown[0]) if shown else "",
    )


def _content(row: Mapping[str, Any], name: str, whole: bool) -> tuple[str, list[Any]]:
    """Text and pictures of a prompt or response, in either form."""
    if not whole:
        return str(row.get(f"{name}_text") or ""), list(row.get(f"{name}_images") or [])
    parts = row["prompt_content"] if name == "prompt" else row[name]["response_content"]
    words = " ".join(str(value) for kind, value in parts if kind == "text")
    return words, [value for kind, value in parts if kind == "image"]


def mj_bench_video(row: Mapping[str, Any], place: Place) -> Preference | str:
    """MJ-Bench-Video (MJ-Bench/MJ-BENCH-VIDEO on the hub; arXiv 2502.01719): `test.json` or `train.json`.

    Seen in aiming-lab/MJ-Video (`datas/test.json`, 1,085 rows; `scripts/data_processor/dataset.py`): ``caption``,
    ``video_0_path``, ``video_1_path`` below `videos/`, ``overall_preference`` "Video 1 better" (video_0; the aspects' scores
    agree), "Video 2 better", "Same" or "Hard to judge", in various capitals. "Same" is a tie. "Hard to judge" is left out.
    """
    said = str(row["overall_preference"]).lower()
    labels: dict[str, Label] = {"video 1 better": 0, "video 2 better": 1, "same": None}
    if said == "hard to judge":
        return "people could not judge"
    if said not in labels:
        raise ValueError(f"overall_preference is {row['overall_preference']!r}")
    return Preference(
        id="",
        prompt=str(row["caption"]),
        candidates=((place.of(row["video_0_path"]),), (place.of(row["video_1_path"]),)),
        label=labels[said],
        tie=said == "same",
        medium="video",
    )


LAYOUTS: Mapping[str, Layout] = {
    "ours": cast(Layout, our_layout),
    "genai-bench": genai_bench,
    "mmrb2": mmrb2,
    "mj-bench-video": mj_bench_video,
}
"""What the command line calls them."""
