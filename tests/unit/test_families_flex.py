"""The Flex family: the request's layout, the schema's bounds, and what each reply means."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from reward_server.families.base import Completion, json_object, side
from reward_server.families.flex import ANCHORS, Flex, anchor_of, category_names, parse
from reward_server.families.generic import GenericPoint
from reward_server.families.vision_reward import VisionReward

NAMES = category_names("image")


def category(name: str, winner: Any = "Image 1", scores: tuple[Any, Any] = (7, 3)) -> dict[str, Any]:
    dim = {"name": "d", "reason_1": "a", "reason_2": "b", "score_1": scores[0], "score_2": scores[1]}
    return {"name": name, "dims": [dim], "cat_reason": "r", "cat_winner": winner}


def answer(winner: Any = "Image 1", categories: Any = None, **more: Any) -> dict[str, Any]:
    listed = [category(n) for n in NAMES] if categories is None else categories
    return {"categories": listed, "reason": "r", "winner": winner, **more}


def test_a_sound_reply_gives_winner_anchors_and_scores() -> None:
    categories = [category("A. " + NAMES[0]), category("B. " + NAMES[1], "Image 2", (2, 8)), category("C. " + NAMES[2])]
    reply = parse(json.dumps(answer("Image 2", categories)))
    assert (reply.status, reply.winner, reply.problem) == ("ok", 1.0, "")
    assert reply.dimensions == {"alignment": 0.0, "quality": 1.0, "aesthetics": 0.0}
    assert reply.scores == {"alignment": (7.0, 3.0), "quality": (2.0, 8.0), "aesthetics": (7.0, 3.0)}


@pytest.mark.parametrize("wrap", ["```json\n%s\n```", "<think>Image 2 {?</think>%s", "Here you are:\n%s\nDone."])
def test_fences_thoughts_and_prose_around_the_object_do_not_matter(wrap: str) -> None:
    text = json.dumps(answer("Video 2"))
    assert parse(wrap % text) == parse(text)
    assert parse(text).winner == 1.0


def test_anchors_are_matched_by_identity_whatever_order_prefix_or_case() -> None:
    shuffled = [
        category("(c) AESTHETICS AND ARTISTRY", "Image 2"),
        category("3. image quality & realism", "Image 1"),
        category("Category B: Semantic Alignment", "Image 2"),
    ]
    reply = parse(json.dumps(answer(categories=shuffled)))
    assert reply.dimensions == {"alignment": 1.0, "quality": 0.0, "aesthetics": 1.0}


@pytest.mark.parametrize(
    "name",
    [
        "Text Rendering Quality", "Aesthetic quality", "Creativity", "", None, 3, ["Quality"], "A", "Category", "【】",
        "AI Image Quality", "3D Image Quality", "B-roll quality", "Category quality", "\u6587\u672c Quality",
        "\u6587\u672c\u3001Image Quality", "B\u6587 Image Quality", "Emotional, Image Quality", "A B Image Quality",
    ],
)  # fmt: skip
def test_a_name_with_foreign_words_is_no_anchor(name: object) -> None:
    assert anchor_of(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "[B] Image Quality", "B - Image Quality & Realism", "Category B \u2014 Image Quality & Realism",
        "II. Image Quality", "Image Quality & Realism (Image)", "b: image quality",
        "B\u3001Image Quality & Realism", "\u3010B\u3011Image Quality & Realism", "B Image Quality & Realism",
        "B/ Image Quality & Realism", "\u3010Image Quality\u3011", "B\uff5cImage Quality", "Category B Image Quality",
        "\u2461 Image Quality", "\u2161\u3001Image Quality", "#2 Image Quality", "**B** Image Quality", "image_quality",
    ],
)  # fmt: skip
def test_an_anchor_is_known_whatever_stands_before_or_after_its_name(name: str) -> None:
    assert anchor_of(name) == "quality"


def test_thoughts_that_never_end_are_no_answer() -> None:
    assert parse("<think>" + json.dumps(answer("Image 1")) + " but wait").problem == "truncated"


def test_video_anchor_names_mean_the_same_anchors() -> None:
    assert tuple(map(anchor_of, category_names("video"))) == ANCHORS
    assert tuple(map(anchor_of, category_names("image"))) == ANCHORS


def test_a_fourth_category_does_not_touch_the_anchors() -> None:
    four = [*[category(n) for n in NAMES], category("D. Text Rendering", "Image 2")]
    assert parse(json.dumps(answer(categories=four))).dimensions == dict.fromkeys(ANCHORS, 0.0)


@pytest.mark.parametrize(
    ("categories", "dimensions", "problem"),
    [
        (
            [category(NAMES[0]), category(NAMES[1], None), category(NAMES[2])],
            {"alignment", "aesthetics"},
            "category without winner",
        ),
        ([category(NAMES[0]), category(NAMES[1])], {"alignment", "quality"}, "category without winner"),
        ([*[category(n) for n in NAMES], category(NAMES[0], "Image 2")], {"quality", "aesthetics"}, "a category twice"),
        ([category(n, scores=(9, 9)) for n in NAMES], set(ANCHORS), "scores do not add up"),
        ([category(n, scores=(float("nan"), 3)) for n in NAMES], set(ANCHORS), "score is no number"),
        ([category(n, scores=("7", 3)) for n in NAMES], set(ANCHORS), "score is no number"),
        ([], set(), "no categories"),
        ([None, 4, "x"], set(), "category without winner"),
    ],
)
def test_a_flaw_inside_costs_its_part_only_and_is_named(categories: Any, dimensions: set[str], problem: str) -> None:
    reply = parse(json.dumps(answer(categories=categories)))
    assert (reply.status, reply.winner, set(reply.dimensions), reply.problem) == ("ok", 0.0, dimensions, problem)


def test_unsound_scores_are_not_reported() -> None:
    assert parse(json.dumps(answer(categories=[category(n, scores=(9, 9)) for n in NAMES]))).scores == {}


def test_null_categories_leave_the_overall_winner() -> None:
    reply = parse('{"categories": null, "winner": "Image 2"}')
    assert (reply.status, reply.winner, dict(reply.dimensions), reply.problem) == ("ok", 1.0, {}, "no categories")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty reply"),
        (" \n\t ", "empty reply"),
        ("Image 1 is better.", "no JSON object"),
        ('[{"winner": "Image 1"}]', "a list, not an object"),
        (json.dumps(answer())[:-30], "truncated JSON"),
        ('{"winner": "Image 1"', "truncated JSON"),
        ("```json\n" + json.dumps(answer()).replace(",", "", 1) + "\n```", "broken JSON"),
        ('{"winner": Image 1}', "broken JSON"),
        ('{"winner": "Image 1", "winner": "Image 2"}', "two answers"),
        (json.dumps(answer()) + json.dumps(answer("Image 2")), "two answers"),
        ("{}", "no winner"),
        ('{"winner": null}', "no winner"),
        ('{"winner": "Image 1/2"}', "winner names no side"),
        ('{"winner": "<Image 1 or Image 2>"}', "winner names no side"),
        ('{"winner": "Image 3"}', "winner names no side"),
        ('{"winner": 1}', "winner names no side"),
        ('{"winner": ["Image 1"]}', "winner names no side"),
        ('{"winner": "' + "Image 1 " * 100 + '"}', "winner names no side"),
    ],
)
def test_what_is_not_plainly_there_is_unparsed_with_its_reason(text: str, problem: str) -> None:
    reply = parse(text)
    assert (reply.status, reply.problem, reply.winner, dict(reply.dimensions)) == ("unparsed", problem, None, {})


@pytest.mark.parametrize(
    ("words", "position"),
    [
        ("Image 1", 0.0),
        ("image 2.", 1.0),
        ("**Video 2**", 1.0),
        ("Image 1 is better than Image 2", 0.0),
        ("Image 2 is slightly better than Image 1.", 1.0),
        ("\uff29\uff4d\uff41\uff47\uff45\u3000\uff12\u3002", 1.0),  # full-width forms
        ("Tie", 0.5),
        ("Both images are equally good", 0.5),
        ("Image 1 is not better than Image 2", None),
        ("Image 1 is better than Image 1", None),
        ("Image 1 and Image 2", None),
        ("Image 12", None),
        ("图1更好", None),
        (True, None),
    ],
)
def test_side_reads_what_names_a_side_and_nothing_else(words: object, position: float | None) -> None:
    assert side(words) == position


def test_deep_nesting_and_huge_numbers_are_broken_json_not_errors() -> None:
    assert json_object('{"a":' * 100_000)[1] == "truncated JSON"
    assert parse('{"winner": "Image 1", "n": ' + "9" * 10_000 + "}").problem == "broken JSON"


def test_the_request_is_one_user_message_pictures_first_in_order() -> None:
    messages = Flex(medium="video").request("a dog", [["v1f1", "v1f2"], ["v2f1", "v2f2"]])
    assert [m["role"] for m in messages] == ["user"]
    content = messages[0]["content"]
    assert [p["image_url"]["url"] for p in content[:-1]] == ["v1f1", "v1f2", "v2f1", "v2f2"]
    assert content[-1]["type"] == "text" and content[-1]["text"].rstrip().endswith("Prompt: a dog")


def test_braces_in_a_prompt_are_left_alone() -> None:
    text = Flex().request("a {prompt} of {x}", [["1"], ["2"]])[0]["content"][-1]["text"]
    assert text.rstrip().endswith("Prompt: a {prompt} of {x}")


def test_frames_per_video() -> None:
    assert (Flex().frames, Flex(medium="video").frames) == (1, 8)


def test_the_wording_can_be_replaced_and_a_useless_file_is_a_complaint(tmp_path: Any) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("Which one? {prompt}")
    assert Flex(prompt_file=str(mine)).request("x", [["1"], ["2"]])[0]["content"][-1]["text"] == "Which one? x"
    (tmp_path / "bare.txt").write_text("Which one is it?")
    for path in (tmp_path / "bare.txt", tmp_path / "missing.txt"):
        ((field, complaint),) = Flex(prompt_file=str(path)).problems()
        assert field == "prompt_file" and str(path) in complaint
    assert not list(Flex(medium="video").problems())


@pytest.mark.parametrize("later", ["", "Another one? {prompt}", None])
def test_a_file_that_changes_later_changes_no_question(tmp_path: Path, later: str | None) -> None:
    wording, checklist, schema = tmp_path / "w.txt", tmp_path / "c.json", tmp_path / "s.json"
    wording.write_text("{questions} Which one? {prompt}")
    checklist.write_text('[{"id": "a", "axis": "x", "question": "?", "weight": 1}]')
    schema.write_text('{"type": "object"}')
    families = [
        Flex(prompt_file=str(wording)),
        VisionReward(prompt_file=str(wording), checklist_file=str(checklist)),
        GenericPoint(prompt_file=str(wording), schema_file=str(schema)),
    ]
    before = [(f.request("x", []), f.options(), f.parse("1: yes")) for f in families]
    for path in (wording, checklist, schema):
        if later is None:
            path.unlink()
        else:
            path.write_text(later)
            os.utime(path, (1, 1))
    assert [(f.request("x", []), f.options(), f.parse("1: yes")) for f in families] == before


def test_an_unusable_file_can_be_mended(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("")
    assert list(Flex(prompt_file=str(mine)).problems())
    mine.write_text("{prompt}")
    assert not list(Flex(prompt_file=str(mine)).problems())


def strings_and_arrays(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, list):
        return [found for part in schema for found in strings_and_arrays(part)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if schema.get("type") in ("string", "array") else []
    return own + [found for part in schema.values() for found in strings_and_arrays(part)]


def test_every_text_and_list_of_the_schema_is_bounded() -> None:
    found = strings_and_arrays(Flex().schema())
    assert len(found) >= 8
    for part in found:
        assert "enum" in part or "maxLength" in part or "maxItems" in part


def test_options_carry_the_schema_and_the_chat_template_switch() -> None:
    options = Flex(medium="video", thinking=False).options()
    schema = options["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["categories", "reason", "winner"]
    assert schema["properties"]["winner"]["enum"] == ["Video 1", "Video 2"]
    assert options["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in Flex().options()


def test_a_reply_that_ran_into_max_tokens_says_so() -> None:
    cut = json.dumps(answer())[:50]
    assert Flex().read(Completion(text=cut, finish_reason="length")).problem == "cut off at max_tokens"
    assert Flex().read(Completion(text=json.dumps(answer()), finish_reason="length")).status == "ok"
