"""Preference files of ours and in published layouts, read whole or refused by row; media by path."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from reward_server.preferences import Preference, our_layout, pictures, read, shown_order, write
from reward_server.readers import LAYOUTS, genai_bench, mj_bench_video, mmrb2


def picture(path: Path, shade: int) -> bytes:
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)
    return path.read_bytes()


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = [
        Preference(id="a", prompt="p", candidates=((str(tmp_path / "1.png"),), ("/far/2.png",)), label=1, category="c"),
        Preference(id="b", prompt="ü", candidates=(("/1.mp4",), ("/2.mp4",)), tie=True, medium="video"),
        Preference(id="c", prompt="p", candidates=(("/1", "/2"), ("/3", "/4")), medium="video"),
        Preference(id="d", prompt="p", candidates=(("/1",), ("/2",)), source=str(tmp_path / "s.png")),
    ]
    write(tmp_path / "deep" / "p.jsonl", written[1:3])
    assert read(tmp_path / "deep" / "p.jsonl").preferences == tuple(written[1:3])
    write(tmp_path / "p.jsonl", written)
    assert read(tmp_path / "p.jsonl").preferences == tuple(written)
    moved = (tmp_path / "p.jsonl").rename(tmp_path / "deep" / "moved.jsonl")
    assert read(moved).preferences[0].candidates == ((str(tmp_path / "deep" / "1.png"),), ("/far/2.png",))
    assert read(moved, media=tmp_path).preferences == tuple(written)


def test_parquet_with_pictures_inside(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    inside = [{"bytes": picture(tmp_path / "x.png", shade), "path": None} for shade in (10, 200)]
    rows = [{"prompt": f"p{k}", "candidates": inside, "label": str(k)} for k in range(2)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    found = read(tmp_path / "p.parquet").preferences
    assert [(p.id, p.prompt, p.label) for p in found] == [("0", "p0", 0), ("1", "p1", 1)]
    assert [pictures(c)[0].getpixel((0, 0)) for c in found[1].candidates] == [(10, 0, 0), (200, 0, 0)]
    assert len(list((tmp_path / "p.media").iterdir())) == 2  # the same content is written once
    assert read(tmp_path).preferences[0].prompt == "p0"  # a folder of Parquet files


GOOD = {"id": "1", "prompt": "p", "candidates": ["a.png", "b.png"], "label": 0}


@pytest.mark.parametrize(
    "row",
    [
        GOOD | {"label": 2},
        GOOD | {"label": "left"},
        GOOD | {"prompt": None},
        {k: v for k, v in GOOD.items() if k != "prompt"},
        GOOD | {"candidates": ["a.png"]},
        GOOD | {"candidates": ["a.png", "b.png", "c.png"]},
        GOOD | {"candidates": [[], ["b.png"]]},
        GOOD | {"candidates": [3, 4]},
        GOOD | {"candidates": None},
        GOOD | {"medium": "sound"},
        {**GOOD, "id": "0"},
        [1],
        None,
    ],
)
def test_a_row_that_is_no_preference_is_named(tmp_path: Path, row: Any) -> None:
    with pytest.raises(ValueError, match="row 2"):
        read(lines(tmp_path / "p.jsonl", {**GOOD, "id": "0"}, row))


@pytest.mark.parametrize(("name", "text"), [("p.jsonl", "{"), ("p.json", "3"), ("p.json", "{}"), ("p.parquet", "PAR1")])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read(tmp_path / name)
    with pytest.raises(ValueError, match="no file"):
        read(tmp_path / "absent.jsonl")


def test_an_id_that_is_null_is_none(tmp_path: Path) -> None:
    """As Parquet has it: two of them are two instances, with ids of their own."""
    found = read(lines(tmp_path / "p.jsonl", {**GOOD, "id": None}, {**GOOD, "id": None})).preferences
    assert len({p.id for p in found}) == 2 and "None" not in {p.id for p in found}


def test_a_tie_has_no_label() -> None:
    with pytest.raises(ValueError, match="tie"):
        replace(Preference(id="1", prompt="p", candidates=(("a",), ("b",)), label=1), tie=True)


# ---------------------------------------------------------------- published layouts


def test_genai_bench(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a bear", "left_image": "l.png", "right_image": "r.png", "vote_type": "leftvote"},
        {"prompt": "a bear", "left_image": "l.png", "right_image": "r.png", "vote_type": "bothbad_vote"},
        {"prompt": "p", "left_video": "https://x/y/l.mp4", "right_video": "https://x/r.mp4", "vote_type": "rightvote"},
        {"id": 7, "prompt": "p", "video_left": "l.mp4", "video_right": "r.mp4", "vote_type": "tievote"},
        {
            "instruct_prompt": "make it red", "source_image": "s.png", "left_output_image": "l.png",
            "right_output_image": "r.png", "vote_type": "leftvote",
        },
    ]  # fmt: skip
    found = read(lines(tmp_path / "g.jsonl", *rows), genai_bench, "/m").preferences
    assert [(p.id, p.label, p.tie, p.medium) for p in found] == [
        ("0", 0, False, "image"), ("1", None, True, "image"), ("2", 1, False, "video"),
        ("7", None, True, "video"), ("4", 0, False, "image"),
    ]  # fmt: skip
    assert found[2].candidates == found[3].candidates == (("/m/l.mp4",), ("/m/r.mp4",))
    assert (found[4].prompt, found[4].source) == ("make it red", "/m/s.png")


def mmrb2_pair(name: str, prompt: list[list[str]], a: list[list[str]], chosen: str = "B") -> dict[str, Any]:
    other = {"model_name": "m", "response_content": [["image", "images/b.png"]]}
    one = {"model_name": "m", "response_content": a}
    about = {"prompt_source": "wise", "prompt_metadata": {}, "chosen": chosen}
    return {"id": name, "prompt_content": prompt, "response_a": one, "response_b": other, **about}


def test_mmrb2(tmp_path: Path) -> None:
    image, text = ["image", "images/a.png"], ["text", "a cat"]
    source = ["image", "input_images/s.png"]
    pairs = [
        mmrb2_pair("t2i", [text], [image], "A"),
        mmrb2_pair("edit", [source, text], [image]),
        mmrb2_pair("many", [source, source, text], [image]),
        mmrb2_pair("words", [text], [text, image, image]),
    ]
    (tmp_path / "t.json").write_text(json.dumps({"pairs": pairs}))
    found = read(tmp_path / "t.json", mmrb2)
    assert [(p.id, p.prompt, p.label, p.category) for p in found.preferences] == [
        ("t2i", "a cat", 0, "wise"),
        ("edit", "a cat", 1, "wise"),
    ]
    assert found.preferences[1].source == str(tmp_path / "input_images" / "s.png")
    assert sum(found.left_out.values()) == 2 and len(found.left_out) == 2
    row = {"pair_id": "h", "prompt_text": "a cat", "prompt_images": [], "chosen": "A", "prompt_source": "wise"}
    row |= {f"response_{k}_text": "" for k in "ab"} | {f"response_{k}_images": [f"{k}.png"] for k in "ab"}
    assert read(lines(tmp_path / "h.jsonl", row), mmrb2).preferences[0].candidates[1] == (str(tmp_path / "b.png"),)
    released = {k: v for k, v in pairs[0].items() if k != "prompt_content"}
    with pytest.raises(ValueError, match="hold no prompts"):
        read(lines(tmp_path / "r.jsonl", released), mmrb2)


def test_mj_bench_video(tmp_path: Path) -> None:
    votes = ("Video 1 better", "Video 1 Better", "Video 2 better", "Same", "Hard to judge")
    row = {"caption": "c", "video_0_path": "test/0_0.mp4", "video_1_path": "test/0_1.mp4"}
    found = read(lines(tmp_path / "m.jsonl", *(row | {"overall_preference": v} for v in votes)), mj_bench_video, "/v")
    assert [(p.label, p.tie) for p in found.preferences] == [(0, False), (0, False), (1, False), (None, True)]
    assert found.preferences[0].candidates == (("/v/test/0_0.mp4",), ("/v/test/0_1.mp4",))
    assert list(found.left_out.values()) == [1]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "ours"])
def test_our_rows_are_not_taken_for_a_published_layout(tmp_path: Path, layout: str) -> None:
    with pytest.raises(ValueError, match="another layout"):
        read(lines(tmp_path / "p.jsonl", GOOD), LAYOUTS[layout])
    assert read(lines(tmp_path / "p.jsonl", GOOD), our_layout).preferences


# ---------------------------------------------------------------- media and order


def test_a_video_gives_uniformly_spaced_frames(tmp_path: Path) -> None:
    shades = np.linspace(0, 230, 33).astype(np.uint8)
    iio.imwrite(tmp_path / "v.mp4", np.broadcast_to(shades[:, None, None, None], (33, 64, 64, 3)).copy(), fps=8)
    from_file = [np.asarray(frame).mean() for frame in pictures([str(tmp_path / "v.mp4")])]
    frames = [str(tmp_path / f"{k:02d}.png") for k in range(33)]
    for path, shade in zip(frames, shades, strict=True):
        Image.new("RGB", (8, 8), (int(shade),) * 3).save(path)
    from_frames = [np.asarray(frame).mean() for frame in pictures(frames)]
    assert len(from_file) == len(from_frames) == 8
    assert from_frames[0] == 0 and from_frames[-1] == 230
    np.testing.assert_allclose(from_file, from_frames, atol=6)  # the codec's error


def test_media_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    for name in ("broken.png", "absent.png"):
        with pytest.raises(ValueError, match=name):
            pictures([str(tmp_path / name)])


def test_the_order_is_random_and_the_seeds() -> None:
    made = [Preference(id=str(k), prompt="p", candidates=(("a",), ("b",))) for k in range(400)]
    orders = [shown_order(p, 0) for p in made]
    assert orders == [shown_order(replace(p, prompt="q"), 0) for p in made]
    assert orders != [shown_order(p, 1) for p in made]
    assert 140 < sum(order == (0, 1) for order in orders) < 260  # six standard deviations
