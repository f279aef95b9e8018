"""Scenes, captions, references and the two prompt files of the testbed."""

import json
from itertools import combinations

import numpy as np
import pytest

from testbed import scenes as world
from testbed.render import render
from testbed.scenes import NOVEL_PAIRS, canonical, caption, from_reference, parse, reference

TRAIN, HELDOUT = (world.load_prompts(f"shapes_{name}") for name in ("train", "heldout"))


def pairs_of(record):
    return {(thing["colour"], thing["shape"]) for thing in record["reference"]["objects"]}


def test_prompt_files_are_what_the_code_builds():
    train, heldout = world.build_prompts()
    assert train == TRAIN
    assert heldout == HELDOUT


def test_prompt_files_have_the_stated_make_up():
    assert (len(TRAIN), len(HELDOUT)) == (2000, 96)
    assert np.mean(["pair" in record["tags"] for record in TRAIN]) >= 0.7
    assert sum("novel" in record["tags"] for record in HELDOUT) == 24
    for records in (TRAIN, HELDOUT):
        assert len({record["text"] for record in records}) == len(records)
        assert len({record["id"] for record in records}) == len(records)


def test_texts_and_references_say_the_same():
    for record in TRAIN + HELDOUT:
        description = from_reference(record["reference"])
        assert reference(description) == record["reference"]
        assert parse(record["text"]) == description
        assert record["text"] in {caption(description, background_first=b) for b in (False, True)}
        assert set(record["text"].split()) <= set(world.WORDS)


def test_no_description_is_both_trained_and_held_out():
    train, heldout = ({canonical(from_reference(r["reference"])) for r in records} for records in (TRAIN, HELDOUT))
    assert not train & heldout
    assert len(heldout) == 96


def test_novel_pairs_are_never_trained():
    assert not any(pairs_of(record) & NOVEL_PAIRS for record in TRAIN)
    for record in HELDOUT:
        assert bool(pairs_of(record) & NOVEL_PAIRS) == ("novel" in record["tags"])


def test_flow_training_never_sees_a_held_out_description_or_a_novel_pair():
    pytest.importorskip("diffusers")
    from testbed.train_flux import FluxConfig, misdescribe
    from testbed.train_vae import training_scenes

    rng = np.random.default_rng(0)
    closed = set(world.heldout_descriptions())
    for scene in training_scenes(rng, 400):
        told = misdescribe(rng, scene.description, FluxConfig())
        assert not scene.description.novel
        assert not told.novel
        assert canonical(scene.description) not in closed
        assert parse(caption(told)) == told


def test_references_are_json():
    description = parse("a small red circle on a white background")
    assert json.loads(json.dumps(reference(description))) == reference(description)


@pytest.mark.parametrize(
    "text", ["", "a red circle", "a big red circle on a white background", "on a white background"]
)
def test_other_texts_do_not_parse(text):
    with pytest.raises(ValueError, match=r"no background|not an object|not a caption"):
        parse(text)


def test_scenes_keep_margins_and_gaps_and_their_relation():
    rng = np.random.default_rng(1)
    for _ in range(500):
        scene = world.sample_scene(rng, world.sample_description(rng))
        for obj in scene.objects:
            low, high = min(obj.x, obj.y) - obj.size, max(obj.x, obj.y) + obj.size
            assert low >= world.MARGIN - 1e-6
            assert high <= world.CANVAS - world.MARGIN + 1e-6
        for a, b in combinations(scene.objects, 2):
            apart = max(abs(a.x - b.x), abs(a.y - b.y)) - a.size - b.size
            assert apart >= world.GAP - 1e-6
            dx, dy = b.x - a.x, b.y - a.y
            holds = {
                "left of": dx > abs(dy),
                "right of": -dx > abs(dy),
                "above": dy > abs(dx),
                "below": -dy > abs(dx),
            }
            assert holds[scene.description.relation or ""]


def test_a_seed_fixes_scene_and_picture():
    one, two = (world.sample_scene(np.random.default_rng(3), parse("a red cross on a gray background")) for _ in "ab")
    assert one == two
    picture = render(one)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert (picture[0, 0] == world.BACKGROUNDS["gray"]).all()
    obj = one.objects[0]
    assert (picture[int(obj.y), int(obj.x)] == world.COLOURS["red"]).all()
