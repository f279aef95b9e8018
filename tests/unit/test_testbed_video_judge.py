"""The tiny judge of clips: its teacher's traces, its tokenizer, its data, and its fast forward against the stock one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from grpo_flex.judging import encode_media
from reward_server.asking import Endpoint
from reward_server.families.chat import frame_indices
from reward_server.families.flex import Flex, parse
from testbed import clips as world
from testbed import judge_loop, judge_model, train_video_judge, video_judge_data, video_judge_trace
from testbed.judge_data import SIBLINGS, Pair
from testbed.judge_model import CLIPS, PICTURES, extended, new_model, new_tokenizer, reply_ids, request_ids, token_ids
from testbed.judge_trace import winner_of
from testbed.measure_judge import ask, summary
from testbed.measure_video_judge import card_of
from testbed.oracle_judge import OracleJudge
from testbed.oracle_replies import Judging
from testbed.preference import frame_times
from testbed.scenes import load_prompts
from testbed.train_video_judge import OUTPUT, PICTURES_JUDGE, STAGES, VideoJudgeConfig, make_batch, material
from testbed.video_judge_data import SEEN, ClipBank, ClipMaterial, draw_renders
from testbed.video_judge_trace import JudgedClip
from testbed.video_oracle import read_clip, score

PROMPTS = 20


@pytest.fixture(scope="module")
def drawn() -> ClipMaterial:
    texts = video_judge_data.training_texts(PROMPTS, seed=1, novel=0.2)
    images = draw_renders(np.random.default_rng(2), [text for text in texts for _ in range(SIBLINGS)])
    return ClipMaterial(renders=ClipBank(texts=texts, images=images.reshape(PROMPTS, SIBLINGS, *images.shape[1:])))


@pytest.fixture(scope="module")
def pairs(drawn: ClipMaterial) -> list[Pair[JudgedClip]]:
    rng = np.random.default_rng(5)
    return [drawn.pair(rng) for _ in range(100)]


@pytest.fixture(scope="module")
def model() -> Qwen3VLForConditionalGeneration:
    return new_model(0, CLIPS).eval()


def text_of(pair: Pair[JudgedClip]) -> str:
    return "".join(video_judge_trace.trace(pair.reference, *pair.judged))


def test_the_parser_reads_the_oracles_winners_from_every_trace(pairs: list[Pair[JudgedClip]]) -> None:
    for pair in pairs:
        reply = parse(text_of(pair))
        one, two = (judged.score for judged in pair.judged)
        assert (reply.status, reply.problem) == ("ok", "")
        assert reply.winner == winner_of(one, two)
        for anchor, name in (("alignment", "alignment"), ("quality", "quality"), ("aesthetics", "composition")):
            first, second = getattr(one, name), getattr(two, name)
            near = abs(first - second) < 0.02
            assert reply.dimensions[anchor] == (reply.winner if near else float(second > first))


def test_some_pairs_are_decided_by_how_they_look(pairs: list[Pair[JudgedClip]]) -> None:
    even = [video_judge_data.is_even(pair) for pair in pairs]
    assert 0.05 < np.mean(even) < 0.5


def test_a_swapped_pair_has_the_opposite_winners(pairs: list[Pair[JudgedClip]]) -> None:
    for pair in pairs:
        one, two = parse(text_of(pair)), parse(text_of(pair.swapped()))
        assert {k: 1 - v for k, v in one.dimensions.items()} == two.dimensions
        assert one.winner == 1 - (two.winner or 0.0)


def test_traces_fit_the_familys_schema(pairs: list[Pair[JudgedClip]]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for pair in pairs[:25]:
        reply = json.loads(text_of(pair))
        jsonschema.validate(reply, Flex(medium="video").schema())
        assert len(reply["categories"]) == 4


def test_a_piece_is_one_token_and_texts_survive(pairs: list[Pair[JudgedClip]]) -> None:
    words = new_tokenizer(CLIPS)
    for pair in pairs:
        for pieces in (
            video_judge_trace.trace(pair.reference, *pair.judged),
            video_judge_trace.description(pair.judged[0].reading),
        ):
            ids = reply_ids(pieces, CLIPS)
            assert words.encode("".join(pieces), add_special_tokens=False) == ids[:-1]
            assert words.decode(ids, skip_special_tokens=True) == "".join(pieces)
            assert len(ids) <= CLIPS.max_tokens


def test_what_nobody_meant_to_show_has_a_trace_too() -> None:
    """Noise, nothing, one flash, and more things than can be named."""
    rng, count = np.random.default_rng(0), len(SEEN)
    still = np.full((count, 48, 48, 3), 255, np.uint8)
    flash = still.copy()
    flash[3] = 0
    crowd = video_judge_data.Play(
        ["white"] * count,
        [
            [("red", "circle")] * count,
            [("blue", "cross")] * count,
            [("cyan", "square")] * count,
            [("red", "cross")] * count,
        ],
        np.array([[[x, y]] * count for x, y in ((10, 10), (10, 38), (38, 10), (38, 38))], float),
    )
    noise = rng.integers(0, 256, still.shape).astype(np.uint8)
    readings = [read_clip(f, frame_times(count)) for f in (still, flash, noise, video_judge_data.drawn(crowd))]
    assert len(readings[-1].objects) == 4
    for record in load_prompts("shapes_video_heldout")[:12]:
        judged = [video_judge_trace.judged(reading, record["reference"]) for reading in readings]
        for one in judged:
            reply_ids(video_judge_trace.description(one.reading), CLIPS)
            for two in judged:
                if winner_of(one.score, two.score) is not None:
                    reply_ids(video_judge_trace.trace(record["reference"], one, two), CLIPS)


def test_every_caption_is_made_of_pieces() -> None:
    known = set(token_ids(CLIPS).values())
    for record in [*load_prompts("shapes_video_train")[:300], *load_prompts("shapes_video_heldout")]:
        ids = request_ids(2, record["text"], CLIPS)
        assert set(ids) <= known, record["text"]
        assert len(ids) <= 114


def test_no_prompt_is_held_out(pairs: list[Pair[JudgedClip]]) -> None:
    asked = [*video_judge_data.training_texts(300, seed=7, novel=0.3), *(pair.text for pair in pairs)]
    assert not world.heldout_gists() & {world.gist(world.parse(text)) for text in asked}


def test_a_judge_is_shown_the_frames_that_the_trainer_samples() -> None:
    assert frame_indices(world.FRAMES, Flex(medium="video").frames) == SEEN
    assert np.allclose(frame_times(len(SEEN)), np.array(SEEN) / (world.FRAMES - 1))


def test_a_render_without_fault_is_right() -> None:
    rng = np.random.default_rng(3)
    told = [video_judge_data.any_description(rng) for _ in range(12)]
    frames = [video_judge_data.drawn(video_judge_data.staged(rng, one)) for one in told]
    scores = [score(f, world.reference(t), frame_times(len(SEEN))) for f, t in zip(frames, told, strict=True)]
    assert np.mean([s.alignment for s in scores]) > 0.9 and np.mean([s.smooth for s in scores]) > 0.95


def test_the_fast_forward_is_the_stock_one(
    model: Qwen3VLForConditionalGeneration, pairs: list[Pair[JudgedClip]]
) -> None:
    some = pairs[:2]
    requests = [request_ids(2, pair.text, CLIPS) for pair in some]
    replies = [reply_ids(video_judge_trace.trace(pair.reference, *pair.judged), CLIPS) for pair in some]
    batch = judge_loop.collate(np.concatenate([np.concatenate(pair.images) for pair in some]), requests, replies)
    with torch.no_grad():
        ours = judge_model.reply_logits(model, batch.pixels, batch.ids, batch.wanted)
        stock = model(
            input_ids=batch.ids,
            attention_mask=(batch.ids != token_ids(CLIPS)["<|endoftext|>"]).long(),
            mm_token_type_ids=(batch.ids == model.config.image_token_id).int(),
            pixel_values=batch.pixels.flatten(0, 1),
            image_grid_thw=torch.tensor([CLIPS.grid_thw] * 32),
        ).logits[batch.wanted]
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)
    assert batch.targets.tolist() == [token for reply in replies for token in reply]


def test_the_saved_folder_asks_as_training_did(model: Qwen3VLForConditionalGeneration, tmp_path: Path) -> None:
    judge_model.save(model, tmp_path / "judge", CLIPS)
    words = AutoTokenizer.from_pretrained(tmp_path / "judge")
    text = "a red circle slowly moving right past a blue square moving left on a white background"
    family = Flex(medium="video", prompt_file=str(tmp_path / "judge" / "prompt.txt"))
    frames = ["data:,"] * family.frames
    rendered = words.apply_chat_template(
        family.request(text, [frames, frames]), tokenize=False, add_generation_prompt=True
    )
    rendered = rendered.replace("<|image_pad|>", "<|image_pad|>" * CLIPS.cells**2)
    assert words(rendered)["input_ids"] == request_ids(2, text, CLIPS)
    assert (tmp_path / "judge" / "model.safetensors").stat().st_size < 12e6


def test_the_oracle_behind_an_endpoint_writes_the_teachers_trace(pairs: list[Pair[JudgedClip]]) -> None:
    judging = Judging(OracleJudge(style="trace"))
    family = Flex(medium="video")
    for pair in pairs[:3]:
        media = [encode_media(frames, family.frames) for frames in pair.images]
        assert judging.reply({"messages": family.request(pair.text, media)}) == text_of(pair)


def test_samples_are_drawn_where_the_generator_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def draw(rng: np.random.Generator, texts: Sequence[str]) -> np.ndarray:
        calls.append(len(texts))
        return draw_renders(rng, texts)

    monkeypatch.setattr(train_video_judge, "wan_draw", lambda folder: draw)
    config = VideoJudgeConfig(build=tmp_path, sampled_prompts=2, rendered_prompts=2, wan=tmp_path / "wan")
    assert material.__wrapped__(config).samples is None and calls == []
    config.wan.mkdir()
    (config.wan / "model_index.json").touch()
    made, again = material.__wrapped__(config), material.__wrapped__(config)
    assert made.samples is not None and again.samples is not None and calls == [2 * SIBLINGS]
    assert np.array_equal(made.samples.images, again.samples.images)
    assert made.samples.images.shape == (2, SIBLINGS, len(SEEN), 48, 48, 3)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_steps_batch_is_the_same_again(stage: judge_loop.Stage, drawn: ClipMaterial) -> None:
    one, two, other = (make_batch(stage, drawn, step) for step in (3, 3, 4))
    assert torch.equal(one.ids, two.ids) and torch.equal(one.pixels, two.pixels)
    assert not torch.equal(one.pixels, other.pixels)
    assert len(one.pixels) == stage.batch * stage.candidates * CLIPS.pictures


def test_training_begins_with_what_the_judge_of_pictures_knows() -> None:
    before = Qwen3VLForConditionalGeneration.from_pretrained(PICTURES_JUDGE, dtype=torch.float32)
    untrained, begun = new_model(3, CLIPS), extended(new_model(3, CLIPS), CLIPS, PICTURES_JUDGE, PICTURES)
    weights = [model.state_dict() for model in (before, begun, untrained)]
    layer = "model.language_model.layers.2.mlp.up_proj.weight"
    assert torch.equal(weights[1][layer], weights[0][layer])
    words = [one["model.language_model.embed_tokens.weight"] for one in weights]
    old, new = token_ids(PICTURES), token_ids(CLIPS)
    assert torch.equal(words[1][new[" red"]], words[0][old[" red"]])
    assert torch.equal(words[1][new[" going astray"]], words[2][new[" going astray"]])


def ramp(side: int, axis: int) -> torch.Tensor:
    """[side, side], rising along one axis from -1 to 1."""
    line = torch.linspace(-1, 1, side)
    return (line[:, None] if axis == 0 else line).expand(side, side)


@pytest.mark.parametrize("axis", (0, 1))
def test_places_and_filters_keep_their_sense_in_another_size(axis: int, tmp_path: Path) -> None:
    """A ramp over a picture's places, and one over a filter's pixels, stay ramps along the same axis."""
    before = new_model(0)
    visual = before.model.visual
    with torch.no_grad():
        visual.pos_embed.weight.copy_(ramp(PICTURES.grid, axis).reshape(-1, 1).expand_as(visual.pos_embed.weight))
        visual.patch_embed.proj.weight.copy_(ramp(PICTURES.patch, axis).expand_as(visual.patch_embed.proj.weight))
    before.save_pretrained(tmp_path)
    visual = extended(new_model(1, CLIPS), CLIPS, tmp_path, PICTURES).model.visual
    places = visual.pos_embed.weight[:, 0].reshape(CLIPS.grid, CLIPS.grid)
    kernel = visual.patch_embed.proj.weight[0, 0, 0] * (CLIPS.patch / PICTURES.patch) ** 2
    for found in (places, kernel):
        assert found.diff(dim=axis).min() > 0.05 and found.diff(dim=1 - axis).abs().max() < 1e-6
        assert found.mean().abs() < 1e-6 and 0.7 < found.max() <= 1


def test_a_filter_answers_as_strongly_in_another_size() -> None:
    before = Qwen3VLForConditionalGeneration.from_pretrained(PICTURES_JUDGE, dtype=torch.float32)
    begun = extended(new_model(3, CLIPS), CLIPS, PICTURES_JUDGE, PICTURES)
    plain = torch.full((1, 3, 2), 0.7)
    answers = [
        model.model.visual.patch_embed(plain[..., None, None].expand(1, 3, 2, side, side).flatten(1))
        for model, side in ((before, PICTURES.patch), (begun, CLIPS.patch))
    ]
    torch.testing.assert_close(*answers)


def test_the_saved_judge_is_small_and_knows_every_piece() -> None:
    assert sum(path.stat().st_size for path in OUTPUT.rglob("*") if path.is_file()) <= 12e6
    words, ids = AutoTokenizer.from_pretrained(OUTPUT), token_ids(CLIPS)
    known = {piece: words.encode(piece, add_special_tokens=False) for piece in video_judge_trace.vocabulary()}
    assert known == {piece: [ids[piece]] for piece in known}
    assert all((OUTPUT / name).read_text() == wording for name, wording in CLIPS.wordings.items())


def test_the_saved_card_says_what_was_measured_and_how_the_judge_was_trained() -> None:
    text = (OUTPUT / "README.md").read_text()
    assert text == card_of()  # else: python -m testbed.measure_video_judge --readme
    assert "cut to 1,600 at step 700" in text


def test_training_does_not_go_on_from_another_judge_of_pictures(
    drawn: ClipMaterial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_video_judge, "material", lambda config: drawn)
    config, model = VideoJudgeConfig(build=tmp_path), new_model(0, CLIPS)
    train_video_judge.train(model, STAGES[0], config, stop_at=1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(train_video_judge, "PICTURES_JUDGE", other)
    with pytest.raises(ValueError, match=r"begun otherwise \(origin was"):
        train_video_judge.train(model, STAGES[0], config, stop_at=2)


def test_training_resumes_exactly(drawn: ClipMaterial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_video_judge, "material", lambda config: drawn)
    stage = replace(STAGES[1], steps=4, batch=2)
    finished = []
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        config, model = VideoJudgeConfig(build=tmp_path / name), new_model(0, CLIPS)
        for stop in stops:
            model = new_model(0, CLIPS)
            train_video_judge.train(model, stage, config, stop_at=stop)
        finished.append(model.state_dict())
    assert all(torch.equal(finished[0][key], finished[1][key]) for key in finished[0])
    with pytest.raises(ValueError, match=r"peak_lr was 0\.0015, not 0\.01.*move it away"):
        train_video_judge.train(new_model(0, CLIPS), replace(stage, peak_lr=1e-2), config)


def test_a_step_lowers_the_loss_of_its_batch(drawn: ClipMaterial) -> None:
    batch, model = make_batch(replace(STAGES[0], batch=4), drawn, 0), new_model(0, CLIPS)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(judge_loop.logits_of(model, batch), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_the_teacher_itself_is_measured_as_never_wrong(pairs: list[Pair[JudgedClip]], tmp_path: Path) -> None:
    with OracleJudge(style="trace").start(tmp_path) as server:
        found = summary(ask(Endpoint(url=server.endpoints[0]), Flex(medium="video"), pairs[:16]))
    assert (found["pairs"], found["parsed"], found["accuracy"], found["consistent"]) == (16, 1, 1, 1)
    assert found["by_category"] == {"alignment": 1, "quality": 1, "aesthetics": 1}
