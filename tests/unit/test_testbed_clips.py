"""Moving shapes, their captions, references and the two prompt files of the video testbed."""

import json

import numpy as np
import pytest

from testbed import clips as world
from testbed.clips import caption, from_reference, gist, parse, reference
from testbed.scenes import BACKGROUNDS, COLOURS, NOVEL_PAIRS, load_prompts

TRAIN, HELDOUT = (load_prompts(f"shapes_video_{name}") for name in ("train", "heldout"))


def kinds_of(record):
    return {(thing["colour"], thing["shape"]) for thing in record["reference"]["objects"]}


def test_prompt_files_are_what_the_code_builds():
    assert world.build_prompts() == (TRAIN, HELDOUT)


def test_prompt_files_have_the_stated_make_up():
    assert (len(TRAIN), len(HELDOUT)) == (2000, 96)
    assert sum("pair" in record["tags"] for record in TRAIN) == 1000
    assert sum("novel" in record["tags"] for record in HELDOUT) == 24
    for records in (TRAIN, HELDOUT):
        assert len({record["text"] for record in records}) == len(records)
        assert len({record["id"] for record in records}) == len(records)


def test_texts_and_references_say_the_same():
    for record in TRAIN + HELDOUT:
        description = from_reference(record["reference"])
        assert reference(description) == record["reference"] == json.loads(json.dumps(reference(description)))
        assert parse(record["text"]) == description
        assert record["text"] in {caption(description, background_first=b) for b in (False, True)}
        assert set(record["text"].split()) <= set(world.WORDS)


def test_nothing_is_both_trained_and_held_out():
    train, heldout = ({gist(from_reference(r["reference"])) for r in records} for records in (TRAIN, HELDOUT))
    assert not train & heldout
    assert heldout == world.heldout_gists()
    assert not any(kinds_of(record) & NOVEL_PAIRS for record in TRAIN)
    for record in HELDOUT:
        assert bool(kinds_of(record) & NOVEL_PAIRS) == ("novel" in record["tags"])
    for clip in world.training_clips(np.random.default_rng(0), 500):
        assert gist(clip.description) not in heldout
        assert not clip.description.novel


def test_every_description_is_stated_once_and_read_back():
    for count in (1, 2):
        told = list(world.all_descriptions(count))
        assert len({caption(d) for d in told}) == len(told)
        for description in told[::7]:
            assert parse(caption(description, background_first=True)) == description
    assert len({gist(d) for d in world.all_descriptions(2)}) == len(list(world.all_descriptions(2)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle on a white background",
        "a red circle slowly moving right",
        "a red circle slowly moving right past on a white background",
        "a red circle moving from the right to the top on a white background",
        "a red circle slowly moving right past a blue square moving up on a white background",
        "a red circle slowly moving right on a pink background",
        "on a white background",
    ],
)
def test_other_texts_do_not_parse(text):
    with pytest.raises(ValueError, match=r"no background|not a caption"):
        parse(text)


def test_clips_keep_inside_apart_and_to_their_caption():
    rng = np.random.default_rng(1)
    for clip in world.training_clips(rng, 300):
        paths, told = np.array(clip.paths), clip.description  # [objects, 9, 2]
        assert paths.shape == (len(told.things), world.FRAMES, 2)
        assert paths.min() - world.RADIUS >= 1
        assert paths.max() + world.RADIUS <= world.SIDE - 1
        for path, name in zip(paths, told.directions, strict=True):
            way, direction = path[-1] - path[0], world.DIRECTIONS[name]
            assert way[direction.axis] == direction.sign * 16 * world.SPEEDS[told.speed]
            assert way[1 - direction.axis] == 0
        if len(paths) == 2:
            axis = world.DIRECTIONS[told.direction].axis
            assert np.abs(paths[0] - paths[1])[:, 1 - axis].min() >= 2 * world.RADIUS + 4
            before, after = (paths[0] - paths[1])[[0, -1], axis]
            assert before * after < 0


def test_a_route_is_where_the_object_goes():
    clip = world.sample_clip(
        np.random.default_rng(0), parse("a red circle moving from the bottom to the middle on a white background")
    )
    (path,) = clip.paths
    assert (path[0][1], path[-1][1]) == (40, 24)
    assert (clip.description.direction, clip.description.speed) == ("up", "slowly")


def test_a_seed_fixes_the_frames():
    told = parse("a red cross quickly moving left on a gray background")
    one, two = (world.sample_clip(np.random.default_rng(3), told) for _ in "ab")
    assert one == two
    frames = world.render_clip(one)
    assert frames.shape == (9, 48, 48, 3)
    assert frames.dtype == np.uint8
    for frame, (x, y) in zip(frames, one.paths[0], strict=True):
        assert (frame[0, 0] == BACKGROUNDS["gray"]).all()
        assert (frame[int(y), int(x)] == COLOURS["red"]).all()
    assert (world.render_clips([one, one])[1] == frames).all()
