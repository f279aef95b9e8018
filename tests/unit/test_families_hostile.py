"""Every family's parser against replies that no model should give: what comes out is stated for each.

A row is (reply, outcome). An outcome that is a text is the problem of an unparsed reply; otherwise it is the
winner's position (comparing families) or the scores (scoring families) of a reply that is ok.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.families.base import ChatFamily, Completion, Family, Reply
from reward_server.families.edit import EditPair, EditPoint
from reward_server.families.flex import Flex
from reward_server.families.generic import GenericPair, GenericPoint
from reward_server.families.reward_dance import RewardDance, parse_logprobs
from reward_server.families.think import Think
from reward_server.families.unified import Unified1Pair, Unified1Point, Unified2Pair, Unified2Point
from reward_server.families.vision_reward import VisionReward, weigh

NAN = float("nan")
THINK = "<think>Image 2 has more detail, but Image 1 is right.</think>"
POINT2 = "Alignment Score (1-5): 2.69\nCoherence Score (1-5): 3.10\nStyle Score (1-5): 4.00"
PAIR2 = (
    "Alignment Score:\n Image 1: 0.43\n Image 2: 0.57\nCoherence Score:\n Image 1: 0.70\n Image 2: 0.30\n"
    "Style Score:\n Image 1: 0.50\n Image 2: 0.50"
)
POINT1 = "red ball (object): 1\nblue (attribute): 0\n\nFinal Score: 3.5"
# What the released judges' own examples look like.
LONG2 = (
    "Alignment Score:\n Image 1: 0.435699999332428\n Image 2: 0.564300000667572\n\n"
    "Coherence Score:\n Image 1: 0.4180000126361847\n Image 2: 0.5820000171661377\n\n"
    "Style Score:\n Image 1: 0.40790000557899475\n Image 2: 0.5921000242233276"
)
CLIP1 = (
    "visual quality: 4\ntemporal consistency: 4\ndynamic degree: 3\ntext-to-video alignment: 1\n"
    "factual consistency: 2\nFinal Score: 6"
)
QUALITIES = {
    "visual_quality": (4.0,), "temporal_consistency": (4.0,), "dynamic_degree": (3.0,), "text_to_video_alignment": (1.0,),
    "factual_consistency": (2.0,),
}  # fmt: skip
EIGHT = "\n".join(f"{k}: yes" for k in range(1, 9))
FULL = {"checklist": (1.0,), "alignment": (0.65,), "quality": (0.25,), "aesthetics": (0.1,)}

CORPUS: list[tuple[ChatFamily, str, Any]] = [
    (Think(), THINK + "<answer>Image 1 is better</answer>", 0.0),
    (Think(), "<answer>\n Video 2 is better. \n</answer>", 1.0),
    (Think(), "<answer>Answer 2 is better</answer>", 1.0),
    (Think(), "<answer>Image 1 is better than Image 2</answer>", 0.0),
    (Think(), "<answer>Both images are equally good</answer>", 0.5),
    (Think(), "", "empty reply"),
    (Think(), "Image 1 is better", "no answer"),
    (Think(), THINK, "no answer"),
    (Think(), THINK[:-8] + "<answer>Image 1 is better</answer>", "truncated"),
    (Think(), THINK + "<answer>Image 1 is bet", "truncated"),
    (Think(), "<answer>Image 1/2 is better</answer>", "answer names no side"),
    (Think(), "<answer>Image 1 is better or Image 2 is better</answer>", "answer names no side"),
    (Think(), "<answer></answer>", "answer names no side"),
    (Think(), "<answer>null</answer>", "answer names no side"),
    (Think(), "<answer>Image 1 is better</answer><answer>Image 2 is better</answer>", "two answers"),
    (Think(), "<answer>Image 1 is better</answer><answer>Image 1 is better</answer>", "two answers"),
    (Think(), "<answer>Image \uff11 is better\u3002</answer>", 0.0),
    (Unified2Point(), POINT2, {"alignment": (2.69,), "coherence": (3.1,), "style": (4.0,)}),
    (
        Unified2Point(),
        "```\n" + POINT2.upper().replace(":", "\uff1a") + "\n```",
        {"alignment": (2.69,), "coherence": (3.1,), "style": (4.0,)},
    ),
    (
        Unified2Point(),
        "\n".join(reversed(POINT2.splitlines())),
        {"alignment": (2.69,), "coherence": (3.1,), "style": (4.0,)},
    ),
    (
        Unified2Point(),
        POINT2.replace("Coherence", "Physics"),
        {"alignment": (2.69,), "physics": (3.1,), "style": (4.0,)},
    ),
    (
        Unified2Point(),
        POINT2.replace("2.69", "2.694700002670288"),
        {"alignment": (2.694700002670288,), "coherence": (3.1,), "style": (4.0,)},
    ),
    (Unified2Point(), POINT2.replace("2.69", "2." + "6" * 25), "axis missing"),
    (Unified2Point(), POINT2[:-30], "axis missing"),
    (Unified2Point(), POINT2.replace("2.69", "nan"), "score out of range"),
    (Unified2Point(), POINT2.replace("2.69", "<number>"), "axis missing"),
    (Unified2Point(), POINT2.replace("2.69", "0"), "score out of range"),
    (Unified2Point(), POINT2.replace("4.00", "5.01"), "score out of range"),
    (Unified2Point(), POINT2 + "\nStyle Score (1-5): 1", "two answers"),
    (Unified2Point(), POINT2 + "\nStyle Score (1-5): 4", {"alignment": (2.69,), "coherence": (3.1,), "style": (4.0,)}),
    (Unified2Point(), "Alignment Score (1-5): 1, 2, 3, 4 or 5", "no score"),
    (Unified2Point(), "", "no score"),
    (Unified2Pair(), PAIR2, 0.0),
    (Unified2Pair(), PAIR2.replace("Image", "Video").replace("Coherence", "Physics"), 0.0),
    (Unified2Pair(), PAIR2.replace("0.70", "0.57").replace("0.30", "0.43"), 0.5),
    (Unified2Pair(), LONG2, 1.0),
    (Unified2Pair(), PAIR2.replace("0.43", "nan"), None),
    (Unified2Pair(), PAIR2.replace("0.43", "0.9"), None),
    (Unified2Pair(), PAIR2[:-20], None),
    (Unified2Pair(), PAIR2.replace("Alignment", "Physics"), None),  # three sound axes, but not the three
    (Unified2Pair(), PAIR2.replace("0.57", "nan") + "\nPhysics Score:\n Image 1: 0.9\n Image 2: 0.1", None),
    (Unified2Pair(), PAIR2.replace("0.", "n"), "score is no number"),
    (Unified2Pair(), " Image 1: 0.4\n Image 2: 0.6", "no score"),
    (Unified2Pair(), PAIR2 + "\n Image 2: 0.9", "two answers"),
    (Unified2Pair(), "", "no score"),
    (Unified1Pair(), "Image 1 is better", 0.0),
    (Unified1Pair(), "The first one lacks the cat.\n\n**Image 2 is better.**", 1.0),
    (Unified1Pair(), "Both images are equally good.", 0.5),
    (Unified1Pair(), "Image 1 is better\nSo, to repeat:\nImage 1 is better", 0.0),
    (Unified1Pair(), "Image 1 is better\nImage 2 is better", "two answers"),
    (Unified1Pair(), 'Reply with "Image 1 is better" or "Image 2 is better"', "answer names no side"),
    (Unified1Pair(), "Image 1/2 is better", "answer names no side"),
    (Unified1Pair(), "图像1更好\u3002", "answer names no side"),
    (Unified1Pair(), "  \n ", "empty reply"),
    (Unified1Pair(), "**Image 1:**\nA sharp dog, and the", "answer names no side"),
    (Unified1Pair(), "**Image 1:**\nA dog.\n**Image 2:**\nA cat.\n\nImage 2 is better", 1.0),
    (Unified1Pair(), "<think>Image 1 is better\nbut wait", "answer names no side"),
    (EditPair(), "Edited image 2\nkeeps the sky", "answer names no side"),
    (Unified1Point(), "<think>\n" + POINT1, "no score"),
    (Unified2Pair(), "<think>\n" + PAIR2, "no score"),
    (VisionReward(), "<think>\n1: yes", "no answer"),
    (GenericPair(), '<think>{"winner": "Image 1"} but wait', "truncated"),
    (Unified1Point(), POINT1, {"final": (3.5,), "elements": (0.5,)}),
    (Unified1Point(), "Final Score: 4/5", {"final": (4.0,)}),
    (Unified1Point(), CLIP1, "score out of range"),
    (Unified1Point(medium="video"), CLIP1, {"final": (6.0,), **QUALITIES}),
    (Unified1Point(medium="video"), CLIP1.replace("6", "10/10"), {"final": (10.0,), **QUALITIES}),
    (Unified1Point(medium="video"), CLIP1.replace("6", "11"), "score out of range"),
    (
        Unified1Point(medium="video"),
        "visual quality: 1\n" + CLIP1.replace("visual quality: 4", "visual quality: 5"),
        {"final": (6.0,), **QUALITIES, "visual_quality": (1.0,)},
    ),
    (
        Unified1Point(medium="video"),
        "dynamic degree: 1\n" + CLIP1,
        {"final": (6.0,), **{k: v for k, v in QUALITIES.items() if k != "dynamic_degree"}},
    ),
    (Unified1Point(), POINT1.replace("): 0", "): 0/1"), {"final": (3.5,), "elements": (1.0,)}),
    (Unified1Point(), "element (type): 0/1\nFinal Score: <number>", "no score"),
    (Unified1Point(), "element (type): 0/1\nFinal Score: 1-5", "no score"),
    (Unified1Point(), POINT1[:-5], "no score"),
    (Unified1Point(), POINT1.replace("3.5", "nan"), "score out of range"),
    (Unified1Point(), POINT1.replace("3.5", "35"), "score out of range"),
    (Unified1Point(), POINT1 + "\nFinal Score: 2", "two answers"),
    (Unified1Point(), "", "empty reply"),
    (EditPair(), "Edited image 2 is better", 1.0),
    (EditPair(), "Edited image 1 is better than edited image 2", 0.0),
    (EditPair(), "Both edited images are equally good", 0.5),
    (EditPair(), "Edited image 1/2 is better", "answer names no side"),
    (EditPoint(), '{"reasoning": "ok", "score": [20, 25]}', {"success": (20.0,), "restraint": (25.0,)}),
    (EditPoint(), '```json\n{"score": [0, 12.5], "reasoning": ""}\n```', {"success": (0.0,), "restraint": (12.5,)}),
    (EditPoint(), '{"reasoning": "ok", "score": [20]}', "no score"),
    (EditPoint(), '{"reasoning": "ok", "score": 20}', "no score"),
    (EditPoint(), '{"reasoning": "ok", "score": null}', "no score"),
    (EditPoint(), '{"reasoning": "ok", "score": [20, NaN]}', "score is no number"),
    (EditPoint(), '{"reasoning": "ok", "score": [20, "5"]}', "score is no number"),
    (EditPoint(), '{"reasoning": "ok", "score": [true, 5]}', "score is no number"),
    (EditPoint(), '{"reasoning": "ok", "score": [20, 26]}', "score out of range"),
    (EditPoint(), '{"score": [1, 2], "score": [3, 4]}', "two answers"),
    (EditPoint(), '{"score": [20, 2', "truncated JSON"),
    (EditPoint(), "[20, 25]", "no JSON object"),
    (VisionReward(), EIGHT, FULL),
    (VisionReward(), EIGHT.replace(": yes", "\uff0e YES\u3002").replace("yes", "Yes"), FULL),
    (VisionReward(), "\n".join(reversed(EIGHT.splitlines())), FULL),
    (VisionReward(), EIGHT + "\n9: no\n99: yes", FULL),
    (VisionReward(), EIGHT.replace("1: yes", "1: no"), {**FULL, "checklist": (0.35,), "alignment": (0.0,)}),
    (VisionReward(), EIGHT[:-8], "answers missing"),
    (VisionReward(), EIGHT.replace("3: yes", "3: maybe"), "answers missing"),
    (VisionReward(), EIGHT.replace("3: yes", "3: yes/no"), "answers missing"),
    (VisionReward(), EIGHT + "\n3: no", "two answers"),
    (VisionReward(), "yes", "no answer"),
    (VisionReward(), "", "empty reply"),
    (RewardDance(), "Yes.", 0.0),
    (RewardDance(), "no", 1.0),
    (RewardDance(), "yes or no", "neither yes nor no"),
    (RewardDance(), "", "empty reply"),
    (GenericPair(), '{"reason": "x", "winner": "Image 2"}', 1.0),
    (GenericPair(), '{"winner": "Image 1/2"}', "winner names no side"),
    (GenericPair(), '{"winner": null}', "no winner"),
    (GenericPair(), '{"winners": "Image 1"}', "no winner"),
    (GenericPair(winner_key="best"), '{"best": "Image 1", "winner": "Image 2"}', 0.0),
    (GenericPair(), '[{"winner": "Image 1"}]', "a list, not an object"),
    (GenericPoint(), '{"reason": "x", "score": 7.5}', {"score": (7.5,)}),
    (GenericPoint(score_keys=("a", "b")), '{"b": 1, "a": 2}', {"a": (2.0,), "b": (1.0,)}),
    (GenericPoint(score_keys=("a", "b")), '{"b": 1}', "score is no number"),
    (GenericPoint(), '{"score": 11}', "score out of range"),
    (GenericPoint(), '{"score": Infinity}', "score is no number"),
    (GenericPoint(), '{"score": "7"}', "score is no number"),
    (GenericPoint(), '{"score": [7, 8]}', "score is no number"),
]


@pytest.mark.parametrize(("family", "text", "outcome"), CORPUS)
def test_what_comes_out_of_each_hostile_reply(family: ChatFamily, text: str, outcome: Any) -> None:
    reply = family.parse(text)
    if isinstance(outcome, str):
        assert (reply.status, reply.problem) == ("unparsed", outcome)
    elif isinstance(outcome, Mapping):
        assert reply.status == "ok" and reply.scores == {k: pytest.approx(v) for k, v in outcome.items()}
    else:
        assert (reply.status, reply.winner) == ("ok", outcome)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (Unified1Pair(), "Image 1 is better\nAlthough, on a second look, image"),
        (EditPair(), "Edited image 1 is better"),
        (Unified1Point(), POINT1),
        (Unified2Point(), POINT2),
        (Unified2Pair(), PAIR2),
    ],
)
def test_a_reply_that_was_cut_off_may_have_said_more(family: ChatFamily, text: str) -> None:
    assert family.read(Completion(text=text)).status == "ok"
    assert family.read(Completion(text=text, finish_reason="length")).problem == "cut off at max_tokens"


@pytest.mark.parametrize(
    ("text", "axes", "problem"),
    [
        (PAIR2, {"alignment": 1.0, "coherence": 0.0, "style": 0.5}, ""),
        (PAIR2.replace("0.43", "nan"), {"coherence": 0.0, "style": 0.5}, "score is no number"),
        (PAIR2.replace("0.43", "0.9"), {"coherence": 0.0, "style": 0.5}, "scores do not add up"),
        (PAIR2[: PAIR2.index("Style")], {"alignment": 1.0, "coherence": 0.0}, "axis missing"),
    ],
)
def test_a_flawed_axis_is_left_out_and_named(text: str, axes: dict[str, float], problem: str) -> None:
    reply = Unified2Pair().parse(text)
    assert (dict(reply.dimensions), reply.problem) == (axes, problem)
    assert set(reply.scores) == set(axes)


def test_a_generic_reply_loses_only_what_is_flawed() -> None:
    family = GenericPair(dimension_keys=("fun", "taste"), score_keys=("points",))
    text = '{"winner": "Image 1", "fun": "Image 2", "taste": "none", "points": [3, 4]}'
    reply = family.parse(text)
    assert (reply.winner, dict(reply.dimensions), dict(reply.scores)) == (0.0, {"fun": 1.0}, {"points": (3.0, 4.0)})
    assert reply.problem == "dimension without winner"
    assert family.parse(text.replace("[3, 4]", "[3, 44]")).problem == "score out of range"


@pytest.mark.parametrize(
    ("tokens", "outcome"),
    [
        ([("yes", math.log(0.6)), ("no", math.log(0.2)), ("maybe", math.log(0.2))], 0.75),
        ([("Yes", math.log(0.3)), (" yes", math.log(0.3)), ("No", math.log(0.4))], 0.6),
        ([("yes", math.log(0.4)), ("no", math.log(0.4))], 0.5),
        ([("no", 0.0)], 0.0),
        ([("yes", math.log(0.3)), ("no", math.log(0.1)), ("Image", math.log(0.6))], "neither yes nor no"),
        ([("Image", 0.0)], "neither yes nor no"),
        ([("yes", NAN)], "log-probability is no number"),
        ([("yes", 3.0)], "log-probability is no number"),
        ([], "no log-probabilities"),
    ],
)
def test_probability_of_yes_by_hand(tokens: list[tuple[str, float]], outcome: float | str) -> None:
    reply = RewardDance().read(Completion(text="", first_token=tuple(tokens)))
    assert reply == parse_logprobs(tokens)
    if isinstance(outcome, str):
        assert (reply.status, reply.problem) == ("unparsed", outcome)
        return
    assert reply.scores["p_yes"] == pytest.approx((outcome, 1 - outcome))
    assert reply.winner == (0.5 if outcome == 0.5 else float(outcome < 0.5))


# ---------------------------------------------------------------- totality and time

FAMILIES: list[ChatFamily] = [
    Flex(),
    Think(),
    Unified2Point(),
    Unified2Pair(),
    Unified1Pair(),
    Unified1Point(),
    EditPair(),
    EditPoint(),
    VisionReward(),
    RewardDance(),
    GenericPair(dimension_keys=("fun",), score_keys=("points",)),
    GenericPoint(),
]
FLEX = json.dumps(
    {
        "categories": [
            {"name": n, "dims": [{"name": "d", "score_1": 6, "score_2": 4}], "cat_winner": "Image 1"}
            for n in ("A. Semantic Alignment & Accuracy", "B. Image Quality & Realism", "C. Aesthetics & Artistry")
        ],
        "reason": "r",
        "winner": "Image 1",
    }
)
SOUND = [FLEX, THINK + "<answer>Image 1 is better</answer>", POINT2, PAIR2, POINT1, EIGHT, "yes", '{"score": [1, 2]}']
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["Image 1", "Image 2", "Image 1/2"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["categories", "winner", "name", "dims", "cat_winner", "score_1", "score_2", "score", "points", "fun"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=25,
)


def check(family: ChatFamily, reply: Reply) -> None:
    """What holds of every reply whatsoever."""
    assert reply.status in ("ok", "unparsed")
    if reply.status == "unparsed":
        assert reply.problem and reply.winner is None and not reply.dimensions and not reply.scores
        return
    assert reply.winner in (None, 0.0, 0.5, 1.0)
    assert set(reply.dimensions.values()) <= {0.0, 0.5, 1.0}
    for values in reply.scores.values():
        assert len(values) == family.candidates and all(math.isfinite(v) for v in values)
    assert reply.winner is not None or reply.dimensions or reply.scores


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@given(text=st.text())
def test_any_text_gives_a_reply(family: ChatFamily, text: str) -> None:
    check(family, family.parse(text))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@given(value=json_values)
def test_any_json_gives_a_reply(family: ChatFamily, value: Any) -> None:
    check(family, family.parse(json.dumps(value)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@given(sound=st.sampled_from(SOUND), cut=st.integers(0, 600), noise=st.text(max_size=5), skip=st.integers(0, 9))
def test_any_damaged_reply_gives_a_reply(family: ChatFamily, sound: str, cut: int, noise: str, skip: int) -> None:
    check(family, family.parse(sound[:cut] + noise + sound[cut + skip :]))


@given(cut=st.integers(0, len(FLEX) - 1))
def test_no_truncated_flex_reply_is_a_verdict(cut: int) -> None:
    assert Flex().parse(FLEX[:cut]).status == "unparsed"


MEGABYTE = 2**20
HUGE = {
    "white space": " \n\t " * (MEGABYTE // 4),
    "white space inside": '{"winner":' + " " * MEGABYTE + '"Image 1"}',
    "one line": "a" * MEGABYTE,
    "braces": "{" * MEGABYTE,
    "brackets": '{"winner":' + "[" * MEGABYTE,
    "closing": "}" * MEGABYTE,
    "quotes": '{"' * (MEGABYTE // 2),
    "backslashes": '{"winner":"' + "\\" * MEGABYTE,
    "tags": "<answer>" * (MEGABYTE // 8),
    "thoughts": "<think></think>" * (MEGABYTE // 15),
    "answers": "Image 1 is better\n" * (MEGABYTE // 18),
    "scores": "Alignment Score (1-5): 3\n Image 1: 0.5\n" * (MEGABYTE // 41),
    "elements": "a (b): 1\n" * (MEGABYTE // 9),
    "brackets and colons": "(((((((:::::::\n" * (MEGABYTE // 15),
    "long lines": ("(" * 390 + "\n") * (MEGABYTE // 391),
    "digits": '{"score":' + "9" * MEGABYTE + "}",
    "combining marks": "a" + "\u0300\u0316" * (MEGABYTE // 2),
    "combining winner": '{"winner":"' + "\u0300\u0316" * (MEGABYTE // 2) + '"}',
    "categories": '{"winner":"Image 1","categories":[' + '{"name":"quality"},' * (MEGABYTE // 19) + "{}]}",
    "fences": "```" * (MEGABYTE // 3),
}


@pytest.mark.parametrize("name", list(HUGE))
def test_a_megabyte_is_read_in_linear_time(name: str) -> None:
    for family in FAMILIES:
        start = time.process_time()
        check(family, family.parse(HUGE[name]))
        assert time.process_time() - start < 3.0, family.name


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize("medium", ["image", "video"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family_asks_with_pictures_first_and_its_own_wording(family: ChatFamily, medium: Any) -> None:
    made = type(family)(medium=medium)
    if made.sources and medium == "video":
        assert [f for f, _ in made.problems()] == ["medium"]
        return
    assert not list(made.problems()) and isinstance(made, Family)
    assert made.frames == {("image", 1): 1, ("image", 2): 1, ("video", 1): 16, ("video", 2): 8}[medium, made.candidates]
    media = [[f"url{k}.{f}" for f in range(made.frames)] for k in range(made.sources + made.candidates)]
    (message,) = made.request("a red dog", media)
    urls = [p["image_url"]["url"] for p in message["content"][:-1]]
    assert urls == [url for frames in media for url in frames]
    text = message["content"][-1]["text"]
    assert text.rstrip().endswith("Prompt: a red dog") and "{prompt}" not in text and "@" not in text
    other = "image" if medium == "video" else "video"
    assert other not in text.casefold()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_wording_itself_echoed_back_is_never_a_verdict(family: ChatFamily) -> None:
    text = family.request("a red dog", [])[0]["content"][-1]["text"]
    assert family.parse(text).status == "unparsed"


def test_schemas_are_there_exactly_where_replies_are_json() -> None:
    with_schema = {f.name for f in FAMILIES if "response_format" in f.options()}
    assert with_schema == {"flex", "edit_point", "generic_pair", "generic_point"}
    assert RewardDance().options() == {"logprobs": True, "top_logprobs": 20, "max_tokens": 1}


@pytest.mark.parametrize(("asked", "complaints"), [(0, 1), (1, 0), (20, 0), (21, 1)])
def test_more_log_probabilities_than_servers_give_are_a_complaint(asked: int, complaints: int) -> None:
    found = list(RewardDance(top_logprobs=asked).problems())
    assert [(field, "1 … 20" in text) for field, text in found] == [("top_logprobs", True)] * complaints


def test_a_users_own_schema_and_rubric(tmp_path: Path) -> None:
    schema = tmp_path / "s.json"
    schema.write_text('{"type": "object"}')
    assert GenericPoint(schema_file=str(schema)).schema() == {"type": "object"}
    made = GenericPair(dimension_keys=("fun",), score_keys=("points",)).schema()
    assert list(made["properties"]) == ["reason", "points", "fun", "winner"]
    (tmp_path / "list.json").write_text("[]")
    assert [f for f, _ in GenericPoint(schema_file=str(tmp_path / "list.json")).problems()] == ["schema_file"]
    assert [f for f, _ in GenericPoint(schema_file=str(tmp_path / "none")).problems()] == ["schema_file"]
    assert [f for f, _ in GenericPoint(low=1, high=1, score_keys=()).problems()] == ["low", "score_keys"]


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "[1]", '[{"id": "a"}]', '[{"id": "a", "axis": "x", "question": "?", "weight": "1"}]',
     '[{"id": "a", "axis": "x", "question": "?", "weight": 1, "needs": "b"}]',
     '[{"id": "a", "axis": "checklist", "question": "?", "weight": 1}]'],
)  # fmt: skip
def test_a_useless_checklist_is_a_complaint(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    ((field, complaint),) = VisionReward(checklist_file=str(path)).problems()
    assert field == "checklist_file" and str(path) in complaint


def test_a_wording_without_room_for_the_checklist_is_a_complaint(tmp_path: Path) -> None:
    without, good = tmp_path / "without.txt", tmp_path / "good.txt"
    without.write_text("Is it good? {prompt}")
    good.write_text("{questions}\n{prompt}")
    ((field, complaint),) = VisionReward(prompt_file=str(without)).problems()
    assert field == "prompt_file" and f"{str(without)!r}, without a {{questions}} mark" in complaint
    assert not list(VisionReward(prompt_file=str(good)).problems())


def test_a_checklist_is_weighed_by_hand_with_its_hierarchy() -> None:
    questions = VisionReward().checklist()
    answers = [q.id not in ("subject", "clean") for q in questions]
    # Left: sharp 0.05, composed 0.05, pleasing 0.05; what needs the subject or clean pixels falls with them.
    assert weigh(questions, answers)["checklist"] == pytest.approx(0.15)
    assert sum(q.weight for q in questions) == pytest.approx(1.0)
    assert sum(q.weight for q in VisionReward(medium="video").checklist()) == pytest.approx(1.0)


def test_what_a_pair_of_videos_is_compared_in() -> None:
    """Coherence; physics is what a single video is scored for."""
    for medium in ("image", "video"):
        assert Unified2Pair(medium=medium).anchors == ("alignment", "coherence", "style")
        wording = Unified2Pair(medium=medium).wording()
        assert "Coherence Score:" in wording and "Physics" not in wording
    assert "Physics Score (1-5):" in Unified2Point(medium="video").wording()
    assert "from 1 (very poor) to 10" in Unified1Point(medium="video").wording()
