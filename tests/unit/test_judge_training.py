"""A judge's training: what TRL is fed, both stages full and with LoRA, resume, and the folder that comes out of it."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
# transformers and TRL annotate models and trainers by their most general classes.
from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from PIL import Image
from torch.distributed.fsdp import StateDictType
from transformers import AutoModelForImageTextToText

from reward_server import dpo, examples, finetuning, judge_training, pairs, sft
from reward_server.__main__ import main
from reward_server.families.base import read_wording
from reward_server.families.flex import Flex
from reward_server.families.unified import Unified2Point
from reward_server.judge_training import Dpo, JudgeTraining, Lora, Sft
from reward_server.ledger import Ledger
from reward_server.pairs import FILE
from testbed import judge_model, judge_trace, refine_judge
from testbed.judge_data import Pair
from testbed.judge_loop import collate
from testbed.judge_model import PICTURES, patches, reply_ids, request_ids
from testbed.judge_preferences import render_pairs
from testbed.oracle_judge import MODEL, OracleJudge
from tests.tiny_vlm import THINKING_TEMPLATE, qwen3_5, save_tiny_vlm

CLIP = "a red circle moving right"
KINDS = {"full": None, "lora": Lora(rank=4, alpha=8)}


class Killed(BaseException):
    """As if the process were gone."""


@pytest.fixture(scope="module")
def drawn() -> list[Pair]:
    return render_pairs(6, seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, drawn: list[Pair]) -> Path:
    """base/: the tiny judge with random weights in float32; traces.jsonl: six pairs of pictures, two of clips."""
    folder = tmp_path_factory.mktemp("judge_training")
    model = judge_model.new_model(0)
    judge_model.save(model, folder / "base")
    model.save_pretrained(folder / "base")
    lines = []
    for number, pair in enumerate(drawn):
        media = [put(folder, f"{number}_{k}", pair.images[k : k + 1]) for k in range(2)]
        lines.append({"id": str(number), "prompt": pair.text, "media": media, "reply": trace(pair), "label": 0})
    for number in (6, 7):
        media = [put(folder, f"{number}_{k}", drawn[number - 6].images) for k in range(2)]
        lines.append({"id": str(number), "prompt": CLIP, "media": media, "reply": '{"winner":"Video 1"}', "label": 0})
    write(folder / "traces.jsonl", lines)
    return folder


def put(folder: Path, name: str, frames: Sequence[np.ndarray]) -> list[str]:
    paths = [f"{name}_{k}.png" for k in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame).save(folder / path)
    return paths


def trace(pair: Pair) -> str:
    return "".join(judge_trace.trace(pair.reference, *pair.judged))


def write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def config(data: Path, tmp_path: Path) -> JudgeTraining:
    wording = str(data / "base" / "prompt.txt")
    fit: dict[str, Any] = {
        "lr": 1e-3,
        "batch": 2,
        "accumulation": 1,
        "steps": 4,
        "schedule": "constant",
        "checkpoint_every": 2,
        "log_every": 1,
    }
    return JudgeTraining(
        name="judge",
        model=str(data / "base"),
        image=Flex(prompt_file=wording),
        video=Flex(medium="video", prompt_file=wording),
        sft=Sft(traces=str(data / "traces.jsonl"), **fit),
        dpo=Dpo(model=str(data / "base"), **fit),
        gradient_checkpointing=False,
        wandb="disabled",
        output=str(tmp_path),
    )


def sft_trainer(config: JudgeTraining) -> Any:
    rows = examples.read_lines(config.sft.traces, ("prompt", "reply"))
    return sft.trainer(config, config.folder / "sft", Path(config.model), rows)


def with_pairs(config: JudgeTraining, drawn: list[Pair]) -> JudgeTraining:
    """Writes pairs in which the right trace is preferred to that of the swapped pair."""
    rows = examples.read_lines(config.sft.traces, ("prompt", "reply"))[: len(drawn)]
    lines = [row | {"chosen": row["reply"], "rejected": trace(p.swapped())} for row, p in zip(rows, drawn, strict=True)]
    undecided = {k: lines[0][k] for k in ("prompt", "media")} | {"id": "none", "outcome": "none right"}
    write(config.folder / FILE, [*lines, undecided])
    return config


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "completion_mask")}
    with torch.no_grad():
        return model.eval()(**inputs).logits


# ---------------------------------------------------------------- what TRL is fed


def test_an_example_is_what_the_served_judge_sees_and_only_its_reply_is_learned(
    config: JudgeTraining, drawn: list[Pair]
) -> None:
    trainer = sft_trainer(config)
    some = drawn[:3]
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(3)])
    assert torch.equal(batch["pixel_values"], patches(np.stack([i for p in some for i in p.images])).flatten(0, 1))
    for row, pair in enumerate(some):
        request, reply = request_ids(2, pair.text), reply_ids(judge_trace.trace(pair.reference, *pair.judged))
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :length].tolist() == [*request, *reply]
        assert batch["labels"][row, :length].tolist() == [-100] * len(request) + reply
        assert set(batch["labels"][row, length:].tolist()) <= {-100}


def test_the_loss_is_the_one_of_a_forward_of_our_own(config: JudgeTraining, drawn: list[Pair]) -> None:
    trainer = sft_trainer(config)
    model, some = trainer.model.eval(), drawn[:3]
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(3)])
    replies = [reply_ids(judge_trace.trace(p.reference, *p.judged)) for p in some]
    fast = collate(
        np.stack([i for p in some for i in p.images]), [request_ids(2, p.text) for p in some], replies, PICTURES
    )
    with torch.no_grad():
        ours = torch.nn.functional.cross_entropy(
            judge_model.reply_logits(model, fast.pixels, fast.ids, fast.wanted), fast.targets
        )
        assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(ours.item(), rel=1e-5)


def test_the_optimizer_has_the_experiments_settings(config: JudgeTraining) -> None:
    fit = replace(config.sft, lr=3e-4, weight_decay=0.07, beta2=0.97)
    for group in sft_trainer(replace(config, sft=fit)).create_optimizer().param_groups:
        assert (group["lr"], group["betas"][1]) == (3e-4, 0.97) and group["weight_decay"] in (0.07, 0.0)


def test_pictures_and_clips_stand_in_one_batch(config: JudgeTraining) -> None:
    trainer = sft_trainer(config)
    batch = trainer.data_collator([trainer.train_dataset[k] for k in (0, 7)])
    shown = (batch["input_ids"] == trainer.model.config.image_token_id).sum(1)
    assert shown.tolist() == [2 * 16, 4 * 16]
    words = trainer.processing_class.tokenizer
    learned = [words.decode([t for t in row.tolist() if t >= 0]) for row in batch["labels"]]
    assert learned[1] == '{"winner":"Video 1"}<|im_end|>' and learned[0].endswith("}<|im_end|>")
    assert CLIP in words.decode(batch["input_ids"][1])


def test_both_replies_of_a_pair_see_the_pictures(config: JudgeTraining, drawn: list[Pair]) -> None:
    config = with_pairs(config, drawn)
    rows = [row for row in examples.read_lines(config.folder / FILE, ("prompt",)) if row.get("chosen")]
    trainer = dpo.trainer(config, config.folder / "dpo", Path(config.model), rows)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    one, other = (batch["input_ids"][k][batch["completion_mask"][k] == 1].tolist() for k in (0, 1))
    pair = drawn[0]
    assert one == reply_ids(judge_trace.trace(pair.reference, *pair.judged))
    assert other == reply_ids(judge_trace.trace(pair.swapped().reference, *pair.swapped().judged))
    assert torch.equal(batch["pixel_values"], patches(np.stack([*pair.images, *pair.images])).flatten(0, 1))
    blind = logits(trainer.model, {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])})
    assert (logits(trainer.model, batch) - blind).abs().max() > 1e-3


# ---------------------------------------------------------------- stage 1


@pytest.mark.parametrize("kind", KINDS)
def test_sft_learns_and_its_folder_is_the_trained_judge(config: JudgeTraining, kind: str) -> None:
    config = replace(config, lora=KINDS[kind], train_vision=kind == "full")
    folder, source = config.folder / "sft", Path(config.model)
    folder.mkdir(parents=True)
    trainer = sft_trainer(config)
    batch = trainer.data_collator([trainer.train_dataset[k] for k in (0, 7)])
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert any("visual" in name for name in trained) == (kind == "full")
    saved = finetuning.fit_and_export(config, trainer, folder, source)
    losses = [line["loss"] for line in finetuning.read_metrics(folder)]
    assert len(losses) == 4 and losses[-1] < losses[0] - (0.5 if kind == "full" else 0.01)
    again = AutoModelForImageTextToText.from_pretrained(saved)
    assert again.dtype == torch.float32
    exact = {"atol": 0.0, "rtol": 0.0} if kind == "full" else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(logits(again, batch), logits(trainer.model, batch), **exact)
    kept = {path.name for path in source.iterdir()}
    assert {path.name for path in saved.iterdir()} == kept
    for name in kept - {"model.safetensors", "config.json", "generation_config.json"}:
        assert (saved / name).read_bytes() == (source / name).read_bytes()
    assert again.generation_config.eos_token_id == judge_model.token_ids()["<|im_end|>"]


def test_a_killed_sft_goes_on_as_if_nothing_had_been(
    config: JudgeTraining, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sft.train(replace(config, name="whole"))
    log = finetuning.Recorder.on_log

    def kill(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        log(self, args, state, control, **more)
        if state.global_step == 3:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(finetuning.Recorder, "on_log", kill)
        with pytest.raises(Killed):
            sft.train(config)
    folder = config.folder / "sft"
    (folder / "checkpoint-3").mkdir()  # the kill came while it was written
    (folder / "checkpoint-3" / "trainer_state.json").write_text('{"global_')
    parts = sft.train(config)
    assert [line["step"] for line in finetuning.read_metrics(folder)] == [1, 2, 3, 4]
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    written = (parts / "model.safetensors").stat().st_mtime_ns
    assert sft.train(config) == parts and (parts / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"was begun otherwise \(lr is 0\.01, not 0\.001\)"):
        sft.train(replace(config, sft=replace(config.sft, lr=0.01)))


def test_a_stage_that_only_lacks_its_export_takes_no_further_step(
    config: JudgeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last step ends no epoch; W&B has one run of the stage, as long as its folder stays."""
    config = replace(config, sft=replace(config.sft, steps=3), wandb="offline")
    whole = sft.train(replace(config, name="whole"))
    with monkeypatch.context() as patched:
        patched.setattr(finetuning, "export", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            sft.train(config)
    folder = config.folder / "sft"
    identity = (folder / "wandb_id").read_text()
    parts = sft.train(config)
    assert [line["step"] for line in finetuning.read_metrics(folder)] == [1, 2, 3]
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    (logged,) = (folder / "wandb").glob("offline-run-*")
    assert logged.name.endswith(identity) and identity != (whole.parent / "wandb_id").read_text()


def test_other_weights_and_another_wording_in_the_same_place_are_other_settings(
    config: JudgeTraining, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "base", tmp_path / "base")
    wording = tmp_path / "wording.txt"
    wording.write_text((data / "base" / "prompt.txt").read_text())
    config = replace(config, model=str(tmp_path / "base"), image=Flex(prompt_file=str(wording)))
    begin = partial(
        finetuning.begin, folder=config.folder / "sft", source=tmp_path / "base", data=Path(config.sft.traces)
    )
    begin(config, config.sft)
    begin(config, config.sft)
    with pytest.raises(ValueError, match="precision is 'bfloat16', not 'auto'"):
        begin(replace(config, precision="bfloat16"), config.sft)
    wording.write_text("Which is better for {prompt}?")
    read_wording.cache_clear()  # a new process reads it anew
    with pytest.raises(ValueError, match="wording of image is"):
        begin(config, config.sft)
    wording.write_text((data / "base" / "prompt.txt").read_text())
    read_wording.cache_clear()
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="weights is"):
        begin(config, config.sft)


# ---------------------------------------------------------------- stage 2


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_starts_at_ln_2_and_prefers_the_right_traces(
    config: JudgeTraining, drawn: list[Pair], kind: str, tmp_path: Path
) -> None:
    config = with_pairs(replace(config, lora=KINDS[kind]), drawn)
    saved = dpo.train(config)
    lines = list(finetuning.read_metrics(config.folder / "dpo"))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["rewards/margins"] > 0
    assert lines[-1]["rewards/accuracies"] > 0.5
    assert (saved / "model.safetensors").stat().st_size == (Path(config.model) / "model.safetensors").stat().st_size
    assert dpo.train(config) == saved


# ---------------------------------------------------------------- both, one after the other


@pytest.mark.parametrize("kind", KINDS)
def test_a_qwen3_5_judge_goes_through_both_stages(
    config: JudgeTraining, drawn: list[Pair], kind: str, tmp_path: Path
) -> None:
    """Its layers of linear attention are trained, adapted and merged like others; its reply comes after an empty thought."""
    base = save_tiny_vlm(tmp_path / "base", build=qwen3_5, chat_template=THINKING_TEMPLATE)
    still = {name: replace(config.family(name), thinking=False) for name in ("image", "video")}
    config = replace(config, model=base, lora=KINDS[kind], **still)
    config = replace(
        with_pairs(config, drawn),
        sft=replace(config.sft, steps=1, warmup=0.0),
        dpo=replace(config.dpo, steps=2, warmup=0.0, model=""),
    )
    trainer = sft_trainer(config)
    assert trainer.processing_class.tokenizer.decode(
        trainer.data_collator([trainer.train_dataset[7]])["input_ids"][0]
    ).endswith('assistant\n<think>\n\n</think>\n\n{"winner":"Video 1"}<|im_end|>')
    first, last = sft.train(config), dpo.train(config)
    begun, updated = finetuning.read_metrics(config.folder / "dpo")
    assert begun["loss"] == pytest.approx(math.log(2), abs=1e-5) and updated["rewards/margins"] != 0
    before, *after = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (base, first, last)
    )
    for weights in after:
        assert before.keys() == weights.keys()
        moved = {name for name in before if not torch.equal(before[name], weights[name])}
        assert any("linear_attn.in_proj_qkv" in name for name in moved) and any("self_attn" in name for name in moved)
        before = weights


class ErringOracle(OracleJudge):
    """In place of a judge in vLLM."""

    served_name: ClassVar[str] = MODEL


def test_the_testbed_takes_its_judge_through_the_recipe_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[str] = []

    def serve(model: str, **_: Any) -> ErringOracle:
        served.append(model)
        return ErringOracle(style="trace", noise=0.7)

    monkeypatch.setattr(refine_judge, "VllmJudge", serve)
    training = replace(refine_judge.config(data / "base", tmp_path / "refine"), wandb="disabled")
    last = refine_judge.refine(training, {"sft": 4, "dpo": 8}, render_pairs)
    assert last == training.folder / "dpo" / "model" and finetuning.finished(training.folder / "dpo")
    assert served == [str(training.folder / "sft" / "model")]
    counts = json.loads((training.folder / pairs.COUNTS).read_text())
    assert (counts["instances"], counts["replies parsed"], counts["unanswered"]) == (8, 16, 0)
    assert counts["pairs"] == counts[pairs.ONE_RIGHT] >= 2  # traces that both name the winner are the same text here
    (logged,) = finetuning.read_metrics(training.folder / "dpo")
    assert logged["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert refine_judge.refine(training, {"sft": 4, "dpo": 8}, render_pairs) == last and len(served) == 1


# ---------------------------------------------------------------- what is refused, and the recipes


TWO = """
from dataclasses import replace
from reward_server.families.flex import Flex
from reward_server.judge_training import JudgeTraining, Sft

def config():
    wording = Flex(prompt_file={wording!r})
    fit = Sft(traces={traces!r}, lr=1e-3, batch=1, accumulation=1, steps=3, schedule="constant", log_every=1)
    return JudgeTraining(name="two", output={output!r}, model={model!r}, image=wording,
                         video=replace(wording, medium="video"), sft=fit, gradient_checkpointing=False, wandb="disabled")
"""


def test_one_process_that_sees_several_gpus_is_refused_and_nothing_is_begun(
    config: JudgeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"sees 4 GPUs.*CUDA_VISIBLE_DEVICES=0.*--num_processes 4"):
        sft.train(config)
    assert not (config.folder / "sft").exists()


def test_what_fsdp_saves_is_whole_whatever_its_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    finetuning.processes()
    assert FullyShardedDataParallelPlugin(fsdp_version=2).state_dict_type is StateDictType.FULL_STATE_DICT


def test_two_processes_learn_what_one_does_with_twice_the_batches(config: JudgeTraining, tmp_path: Path) -> None:
    """The same examples in a step, hence the same losses and gradients, written down by one of the two."""
    assert isinstance(config.image, Flex)
    known = {"wording": config.image.prompt_file, "traces": config.sft.traces, "output": str(tmp_path)}
    (tmp_path / "two.py").write_text(TWO.format(model=config.model, **known))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "reward_server", "sft"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, *launch, str(tmp_path / "two.py")], env=environment)
    sft.train(replace(config, sft=replace(config.sft, batch=1, accumulation=2, steps=3)))
    assert run.wait(timeout=120) == 0
    alone, together = (list(finetuning.read_metrics(tmp_path / name / "sft")) for name in ("judge", "two"))
    assert [line["step"] for line in together] == [1, 2, 3]
    for one, two in zip(alone, together, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert json.loads((tmp_path / "two" / "sft" / finetuning.SETTINGS).read_text())["processes"] == 2
    assert finetuning.finished(tmp_path / "two" / "sft")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sft",), "sft.traces is not set"),
        (("sft", "sft.traces=gone.jsonl"), "there is no file 'gone.jsonl'"),
        (("sft", "sft.trces=x"), "did you mean 'traces'"),
        (("sft", "sft.lr=high"), "sft.lr=high: it needs to be a float"),
        (("sft", "image.thinking=7"), "image.thinking=7: it needs to be a bool or none"),
        (("sft", "sft.lr=0"), "sft.lr is 0.0; it needs to be above 0"),
        (("sft", "sft=1"), "sft is an object; set one of its fields, e.g. sft.lr=…"),
        (("sft", "name.first=1"), "'name.first' cannot be set"),
        (("sft", "lora.rank=8"), "choose an object in the experiment file"),
        (("sft", "video.medium=image"), "video is set for images"),
        (("sft", "steps"), "'steps' is no assignment"),
        (("dpo",), "run the sft stage first"),
        (("pairs",), "pairs.preferences is not set"),
        (("pairs", "pairs.endpoint.temperature=0"), "both traces would be the same"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, *assignments = words
    given = [stage, "experiments/judge_flex_qwen3vl_2b.py", f"output={tmp_path}", *assignments]
    assert main(given) == 2
    assert said in capsys.readouterr().err


def test_a_trace_may_hold_what_other_readers_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    prompt = "a red bus\u2028at night\x85"
    with Ledger(tmp_path / "traces.jsonl") as file:
        file.add({"id": "1", "prompt": prompt, "reply": "b", "media": [["a.png"], ["a.png"]]})
    (row,) = examples.read_lines(tmp_path / "traces.jsonl", ("prompt", "reply"))
    assert row["prompt"] == prompt


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: JSONDecodeError"),
        ('{"prompt": "a"}', "line 1: KeyError 'media'"),
        ('{"prompt": "a", "reply": 3, "media": [["there.png"], ["there.png"]]}', "reply is no text"),
        ('{"prompt": "a", "reply": "b", "media": [["there.png"], ["gone.png"]]}', "gone.png' is not there"),
        ('{"prompt": "a", "reply": "b", "media": [["there.png"]]}', "it needs 2 lists of paths"),
        ('{"prompt": "<|image_pad|>", "reply": "b", "media": [["there.png"], ["there.png"]]}', "has the mark"),
        (
            '{"prompt": "a", "reply": "b", "media": [["there.png"]], "question": "guess"}',
            "'guess' is none of the training's questions: ['score']",
        ),
        (
            '{"prompt": "a", "reply": "b", "media": [["there.png"], ["there.png"]], "question": "score"}',
            "it needs 1 lists of paths",
        ),
        (
            '{"prompt": "a", "reply": "b", "media": [["there.png", "there.png"]], "question": "score"}',
            "the question 'score' is about images",
        ),
        ("", "there is nothing to train on"),
    ],
)
def test_an_unusable_trace_is_named(config: JudgeTraining, tmp_path: Path, line: str, said: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "there.png")
    (tmp_path / "traces.jsonl").write_text(line)
    asked = replace(config, questions={"score": Unified2Point()})
    with pytest.raises(ValueError, match=r".*") as raised:
        sft.train(replace(asked, sft=replace(config.sft, traces=str(tmp_path / "traces.jsonl"))))
    assert said in str(raised.value)


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from reward_server.judge_training import JudgeTraining, Sft

@dataclass(frozen=True)
class Budget:
    steps: int = 7

def config():
    return JudgeTraining(name="mine", model="folder", sft=Sft(steps=Budget().steps))
"""


def test_an_experiment_may_have_dataclasses_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    assert judge_training.load(path, ["sft.lr=0.5"]).sft == Sft(lr=0.5, steps=7)


def test_a_template_with_another_end_is_refused(config: JudgeTraining) -> None:
    processor = examples.load_processor(Path(config.model))
    processor.chat_template = processor.chat_template.replace("<|im_end|>", "<|endoftext|>")
    rows = [{"prompt": "a", "media": [["a"], ["b"]], "completion": "c"}]
    with pytest.raises(ValueError, match="would not learn to stop"):
        examples.dataset(config, processor, rows)


@pytest.mark.parametrize("size", ["8b", "2b"])
def test_the_recipes_have_the_papers_settings(size: str) -> None:
    made = judge_training.load(f"experiments/judge_flex_qwen3vl_{size}.py", ["sft.traces=x", "lora=none"])
    fit = made.sft
    assert (fit.lr, fit.batch, fit.accumulation, fit.warmup, fit.traces) == (2.5e-6, 2, 2, 0.1, "x")
    assert (made.dpo.beta, made.pairs.endpoint.temperature) == (0.1, 0.7)
