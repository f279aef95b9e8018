"""The tiny judge: its teacher's traces, its tokenizer, its data, and its fast forward against the stock one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reward_server import examples, finetuning
from reward_server.asking import Endpoint
from reward_server.families.chat import data_url
from reward_server.families.flex import Flex, parse
from reward_server.families.reasoning import Reasoning
from reward_server.families.unified import Unified2Point, parse_point2
from testbed import judge_data, judge_examples, judge_model, judge_trace, train_judge
from testbed import scenes as world
from testbed.judge_data import Bank, Material, Pair
from testbed.judge_loop import collate
from testbed.judge_model import PICTURES, new_model, new_tokenizer, patches, reply_ids, request_ids, token_ids
from testbed.measure_judge import ask, card_of, facts, score, summary
from testbed.oracle_judge import OracleJudge
from testbed.oracle_replies import Judging
from testbed.preference import Score
from testbed.train_judge import OUTPUT, JudgeConfig


@pytest.fixture(scope="module")
def material() -> Material:
    texts = judge_data.training_texts(40, seed=1, novel=0.2)
    banks = []
    for seed in (2, 3):
        images = judge_data.draw_renders(np.random.default_rng(seed), [t for t in texts for _ in range(4)])
        banks.append(Bank(texts=texts, images=images.reshape(40, 4, 64, 64, 3)))
    return Material(samples=banks[0], renders=banks[1])


@pytest.fixture(scope="module")
def pairs(material: Material) -> list[Pair]:
    rng = np.random.default_rng(5)
    return [material.pair(rng) for _ in range(150)]


@pytest.fixture(scope="module")
def model() -> Qwen3VLForConditionalGeneration:
    return new_model(0).eval()


def text_of(pair: Pair) -> str:
    return "".join(judge_trace.trace(pair.reference, *pair.judged))


def test_the_parser_reads_the_oracles_winners_from_every_trace(pairs: list[Pair]) -> None:
    for pair in pairs:
        reply = parse(text_of(pair))
        one, two = (judged.score for judged in pair.judged)
        assert (reply.status, reply.problem) == ("ok", "")
        assert reply.winner == judge_trace.winner_of(one, two)
        for anchor, name in (("alignment", "alignment"), ("quality", "quality"), ("aesthetics", "composition")):
            first, second = getattr(one, name), getattr(two, name)
            assert reply.dimensions[anchor] == (reply.winner if first == second else float(second > first))


def test_the_parser_reads_the_oracles_marks_from_every_scored_picture(material: Material) -> None:
    rng, words = np.random.default_rng(7), new_tokenizer()
    for _ in range(60):
        _, reference, _, judged = material.prompted(rng)
        pieces = judge_trace.scores(reference, judged)
        reply = parse_point2("".join(pieces))
        values = (judged.score.alignment, judged.score.quality, judged.score.composition)
        assert reply.status == "ok"
        for axis, value in zip(("alignment", "coherence", "style"), values, strict=True):
            assert reply.scores[axis][0] == pytest.approx(1 + 4 * value, abs=0.11)
        assert words.encode("".join(pieces), add_special_tokens=False) == reply_ids(pieces)[:-1]


def test_an_example_is_asked_as_the_served_judge_will_be(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each kind: the request and the reply in the judge's own tokens, and the picture's own patches."""
    about = JudgeConfig(build=tmp_path, pairs=3, scored=2, more_pairs=2, more_scored=1)
    monkeypatch.setattr(train_judge, "material", lambda _: material)
    train_judge.prepare(about)
    config = train_judge.config("compare", about)
    processor = examples.load_processor(about.folder / "untrained")
    made = [
        (judge_examples.descriptions(material), "describe"),
        (judge_examples.comparisons(material, about.pairs, about.seed + 2), "compare"),
        (judge_examples.scorings(material, about.scored, about.seed + 3), "compare"),
    ]
    rows = {
        stage: iter(examples.read_lines(about.folder / f"{stage}.jsonl", ("prompt", "reply"), config.questions))
        for stage in train_judge.STAGES
    }
    for those, stage in made:
        for (_, prompt, images, pieces), row in zip(islice(those, 3), rows[stage], strict=False):
            one = examples.example(config, processor, row)
            read = processor(images=[Image.open(path) for (path,) in row["media"]], text=[one["prompt"] + one["reply"]])
            assert read["input_ids"][0] == [*request_ids(len(images), prompt), *reply_ids(pieces)]
            assert np.array_equal(read["pixel_values"], patches(np.stack(images)).flatten(0, 1))
    assert next(rows["compare"], None) is None  # all five were read


def test_a_picture_is_kept_once(material: Material, tmp_path: Path) -> None:
    for name in ("one", "two"):
        judge_examples.write(tmp_path / f"{name}.jsonl", islice(judge_examples.descriptions(material), 8))
    assert len(list((tmp_path / "pictures").iterdir())) == 8
    before = (tmp_path / "one.jsonl").read_text()
    judge_examples.write(tmp_path / "one.jsonl", judge_examples.scorings(material, 2, 0))
    assert (tmp_path / "one.jsonl").read_text() == before  # what is there already is not made again


def test_the_recipe_makes_the_judge_from_untrained_weights(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = JudgeConfig(build=tmp_path, pairs=4, scored=2, more_pairs=4, more_scored=2)
    monkeypatch.setattr(train_judge, "material", lambda _: material)
    for name, fit in train_judge.FITS.items():
        monkeypatch.setitem(train_judge.FITS, name, replace(fit, steps=2, batch=2, log_every=1))
    last = train_judge.train_all(about, processes=1)
    made = [about.folder / stage / "sft" / "model" for stage in train_judge.STAGES]
    folders = [about.folder / "untrained", *made]
    begun = [json.loads((folder.parent / "settings.json").read_text())["model"] for folder in made]
    assert begun == [str(folder) for folder in folders[:-1]] and last == made[-1]
    weights = [Qwen3VLForConditionalGeneration.from_pretrained(folder).state_dict() for folder in folders]
    for before, after in pairwise(weights):
        assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert [line["step"] for line in finetuning.read_metrics(last.parent)] == [1, 2]


def test_examples_of_another_amount_are_not_trained_on(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_judge, "material", lambda _: material)
    about = JudgeConfig(build=tmp_path, pairs=4, scored=2, more_pairs=4, more_scored=2)
    train_judge.prepare(about)
    with pytest.raises(ValueError, match="pairs is 5, not 4"):
        train_judge.prepare(replace(about, pairs=5))


def test_a_swapped_pair_has_the_opposite_winners(pairs: list[Pair]) -> None:
    for pair in pairs:
        one, two = parse(text_of(pair)), parse(text_of(pair.swapped()))
        assert {k: 1 - v for k, v in one.dimensions.items()} == two.dimensions
        assert one.winner == 1 - (two.winner or 0.0)


def test_traces_fit_the_familys_schema(pairs: list[Pair]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import json

    for pair in pairs:
        jsonschema.validate(json.loads(text_of(pair)), Flex().schema())


def test_a_piece_is_one_token_and_texts_survive(pairs: list[Pair]) -> None:
    words = new_tokenizer()
    for pair in pairs:
        for pieces in (
            judge_trace.trace(pair.reference, *pair.judged),
            judge_trace.description(pair.judged[0].reading),
        ):
            ids = reply_ids(pieces)
            assert words.encode("".join(pieces), add_special_tokens=False) == ids[:-1]
            assert words.decode(ids, skip_special_tokens=True) == "".join(pieces)
    strange = 'grün "cats"\n\t{}'
    assert words.decode(words.encode(strange, add_special_tokens=False)) == strange


def test_the_saved_judge_is_small_and_knows_every_piece() -> None:
    """What its teacher writes today is what its tokenizer was made for: a piece that is no token would fall into bytes."""
    assert sum(path.stat().st_size for path in OUTPUT.rglob("*") if path.is_file()) <= 12e6
    words, ids = AutoTokenizer.from_pretrained(OUTPUT), token_ids()
    known = {piece: words.encode(piece, add_special_tokens=False) for piece in judge_trace.vocabulary()}
    assert known == {piece: [ids[piece]] for piece in known}
    assert all((OUTPUT / name).read_text() == wording for name, wording in judge_model.PICTURES.wordings.items())


def test_every_caption_is_few_tokens() -> None:
    prompts = [*world.load_prompts("shapes_train")[:200], *world.load_prompts("shapes_heldout")]
    assert max(len(request_ids(2, prompt["text"])) for prompt in prompts) <= 54


def test_a_pair_without_a_better_picture_is_left_out() -> None:
    text = "a red circle on a white background"
    image = judge_data.render(world.sample_scene(np.random.default_rng(0), world.parse(text)))
    bank = Bank(texts=[text], images=np.stack([image] * 4)[None])
    assert judge_data.siblings(bank, 0, 0, 1) is None


def test_no_prompt_is_held_out(pairs: list[Pair]) -> None:
    closed = {world.canonical(description) for description in world.heldout_descriptions()}
    asked = [*judge_data.training_texts(300, seed=7, novel=0.3), *(pair.text for pair in pairs)]
    assert not closed & {world.canonical(world.parse(text)) for text in asked}


def test_a_bank_is_drawn_once_and_refuses_other_prompts(tmp_path: Path) -> None:
    calls: list[int] = []

    def draw(rng: np.random.Generator, texts: Sequence[str]) -> np.ndarray:
        calls.append(len(texts))
        return judge_data.draw_renders(rng, texts)

    texts = judge_data.training_texts(3, seed=1)
    first = judge_data.load_bank(tmp_path, texts, draw, 0)
    again = judge_data.load_bank(tmp_path, texts, draw, 0)
    assert calls == [12] and np.array_equal(first.images, again.images)
    with pytest.raises(ValueError, match="remove"):
        judge_data.load_bank(tmp_path, texts[::-1], draw, 0)


def test_patches_are_the_processors() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    settings = dict(judge_model.processor_settings()["preprocessor_config.json"])
    del settings["image_processor_type"], settings["processor_class"]
    made = Qwen2VLImageProcessorPil(**settings)([Image.fromarray(i) for i in images], return_tensors="pt")  # pyright: ignore[reportArgumentType]
    assert torch.equal(made["pixel_values"], patches(images).flatten(0, 1))
    assert made["image_grid_thw"].tolist() == [[1, 8, 8]] * 3


def test_the_fast_forward_is_the_stock_one(model: Qwen3VLForConditionalGeneration, pairs: list[Pair]) -> None:
    some = pairs[:3]
    requests = [request_ids(2, pair.text) for pair in some]
    replies = [reply_ids(judge_trace.trace(pair.reference, *pair.judged)) for pair in some]
    batch = collate(np.stack([image for pair in some for image in pair.images]), requests, replies, PICTURES)
    with torch.no_grad():
        ours = judge_model.reply_logits(model, batch.pixels, batch.ids, batch.wanted)
        stock = model(
            input_ids=batch.ids,
            attention_mask=(batch.ids != token_ids()["<|endoftext|>"]).long(),
            mm_token_type_ids=(batch.ids == model.config.image_token_id).int(),
            pixel_values=batch.pixels.flatten(0, 1),
            image_grid_thw=torch.tensor([[1, 8, 8]] * 6),
        ).logits[batch.wanted]
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)
    assert len(batch.targets) == sum(map(len, replies))
    assert batch.targets.tolist() == [token for reply in replies for token in reply]


def test_the_saved_folder_asks_as_training_did(model: Qwen3VLForConditionalGeneration, tmp_path: Path) -> None:
    judge_model.save(model, tmp_path / "judge")
    words = AutoTokenizer.from_pretrained(tmp_path / "judge")
    text = "a small red circle on a white background"
    family = Flex(prompt_file=str(tmp_path / "judge" / "prompt.txt"))
    messages = family.request(text, [["data:,"], ["data:,"]])
    rendered = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    rendered = rendered.replace("<|image_pad|>", "<|image_pad|>" * 16)
    assert words(rendered)["input_ids"] == request_ids(2, text)
    point = Unified2Point(prompt_file=str(tmp_path / "judge" / "prompt_point.txt"))
    rendered = words.apply_chat_template(
        point.request(text, [["data:,"]]), tokenize=False, add_generation_prompt=True
    ).replace("<|image_pad|>", "<|image_pad|>" * 16)
    assert words(rendered)["input_ids"] == request_ids(1, text)
    again = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "judge", dtype=torch.float32)
    assert (tmp_path / "judge" / "model.safetensors").stat().st_size < 12e6
    assert again.generation_config.eos_token_id == token_ids()["<|im_end|>"]


def test_the_teacher_itself_is_measured_as_never_wrong(pairs: list[Pair], tmp_path: Path) -> None:
    with OracleJudge(style="trace").start(tmp_path) as server:
        answers = ask(Endpoint(url=server.endpoints[0]), Flex(), pairs[:12])
    found = summary(answers)
    assert (found["pairs"], found["parsed"], found["accuracy"], found["consistent"], found["first"]) == (
        12,
        1,
        1,
        1,
        0.5,
    )
    assert all(share in (1.0, pytest.approx(np.nan, nan_ok=True)) for share in found["by_category"].values())
    assert all(answer.pair is pair for answer, pair in zip(answers, pairs[:12], strict=True))


def test_a_judge_without_sense_is_measured_without_a_parsed_reply(pairs: list[Pair], tmp_path: Path) -> None:
    with OracleJudge(garbage_rate=1.0).start(tmp_path) as server:
        endpoint = Endpoint(url=server.endpoints[0])
        found = [summary(ask(endpoint, Flex(), pairs[:4])), summary(score(endpoint, Unified2Point(), pairs[:4]))]
    for one in found:
        assert (one["pairs"], one["parsed"], one["accuracy"], one["consistent"]) == (4, 0, 0, 0)


def test_the_saved_card_says_what_was_measured_and_how_the_judge_was_trained() -> None:
    text = (OUTPUT / "README.md").read_text()
    assert text == card_of(OUTPUT)  # else: python -m testbed.measure_judge --readme
    assert json.loads((OUTPUT / "measured.json").read_text())["weights"] == facts(OUTPUT)["weights"]
    assert "| describe | 52,000 pictures | 3,000 steps | 48 x 2 | 0.002 |" in text
    assert "| dpo | of 1,000 pairs | 1 epoch | 12 x 2 | 2e-05 |" in text


def test_scores_of_single_pictures_name_the_winner_of_a_pair(pairs: list[Pair], tmp_path: Path) -> None:
    clear = [pair for pair in pairs if _alignment_decides(*(judged.score for judged in pair.judged))][:8]
    with OracleJudge().start(tmp_path) as server:
        found = summary(score(Endpoint(url=server.endpoints[0]), Unified2Point(), clear))
    assert (found["pairs"], found["parsed"], found["accuracy"], found["consistent"]) == (8, 1, 1, 1)


def _alignment_decides(one: Score, two: Score) -> bool:
    return abs(one.alignment - two.alignment) > 0.4 and abs(one.quality - two.quality) < 0.2


def test_the_teacher_knows_the_better_reasoned_of_two_traces(pairs: list[Pair]) -> None:
    judging = Judging(OracleJudge(style="trace"))
    for pair in pairs[:6]:
        own, worse = text_of(pair), text_of(pair.swapped())
        for answers, expected in (((own, worse), 0), ((worse, own), 1), ((worse, worse), 0.5)):
            family = Reasoning(answers=answers)
            urls = [[data_url(Image.fromarray(image))] for image in pair.images]
            reply = family.parse(judging.reply({"messages": family.request(pair.text, urls)}))
            assert reply.winner == expected
