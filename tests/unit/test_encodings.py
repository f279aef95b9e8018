"""Encodings of prompts on disk: made once, the same bits ever after, safe against neighbours and damage."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_flex.config import RunConfig
from grpo_flex.generators import picture
from grpo_flex.generators.encodings import Encodings, fingerprint, report
from grpo_flex.generators.memory import Memory
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Prompt

PROMPTS = [Prompt(id="p0", text="a red circle"), Prompt(id="p1", text="a blue square on a white background")]


class Encoder:
    """Counts; gives every text numbers of its own."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.rests = 0

    def __call__(self, text: str) -> Mapping[str, torch.Tensor]:
        self.texts.append(text)
        numbers = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(len(text)))
        return {"embeds": numbers.to(torch.bfloat16), "mask": torch.tensor([[True, True, False]])}

    def rest(self) -> None:
        self.rests += 1

    def kept_in(self, folder: Path, key: str = "model") -> Encodings:
        return Encodings(str(folder), key, self, self.rest)


def test_each_text_is_encoded_once_and_read_back_bit_for_bit(tmp_path: Path) -> None:
    first, second = Encoder(), Encoder()
    made = first.kept_in(tmp_path)(["a", "bb", "a"])
    read = second.kept_in(tmp_path)(["bb", "a", "bb"])
    assert first.texts == ["a", "bb"] and second.texts == []
    for name in ("embeds", "mask"):
        assert torch.equal(made[1][name], read[0][name]) and made[0][name].dtype == read[1][name].dtype
    assert report(str(tmp_path)).startswith("2 encodings of prompts, ")


def test_filling_leaves_the_encoder_to_the_next_call(tmp_path: Path) -> None:
    encoder = Encoder()
    kept = encoder.kept_in(tmp_path)
    kept.fill(["a", "bb"])
    kept.fill(["bb", "ccc"])
    assert encoder.texts == ["a", "bb", "ccc"] and encoder.rests == 0
    kept(["a"])
    assert encoder.texts == ["a", "bb", "ccc"] and encoder.rests == 1


def test_another_model_is_another_encoding(tmp_path: Path) -> None:
    encoder = Encoder()
    for key in ("model", "other"):
        encoder.kept_in(tmp_path, key)(["a"])
    assert encoder.texts == ["a", "a"]


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    encoder = Encoder()
    (made,) = encoder.kept_in(tmp_path)(["a"])
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    (again,) = encoder.kept_in(tmp_path)(["a"])
    assert encoder.texts == ["a", "a"] and torch.equal(made["embeds"], again["embeds"])


def test_many_may_fill_one_folder(tmp_path: Path) -> None:
    encoders, texts = [Encoder() for _ in range(4)], [f"text {i}" for i in range(30)]
    threads = [threading.Thread(target=e.kept_in(tmp_path).fill, args=(texts,)) for e in encoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    late = Encoder()
    assert len(late.kept_in(tmp_path)(texts)) == 30 and late.texts == []
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 30


def test_a_model_that_was_saved_anew_is_another_model(tmp_path: Path) -> None:
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"old")
    before = fingerprint(str(tmp_path), 512)
    assert before == fingerprint(str(tmp_path), 512) != fingerprint(str(tmp_path), 256)
    os.utime(weights, (1, 1))
    assert fingerprint(str(tmp_path), 512) != before


def test_a_hub_model_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def cached(commit: str) -> None:
        index = tmp_path / "snapshots" / commit / "model_index.json"
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(index))

    cached("abc")
    first = fingerprint("somebody/model")
    cached("def")
    assert fingerprint("somebody/model") != first


def test_a_second_run_never_loads_the_text_encoders(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = RolloutWorker(config).model.encode(PROMPTS)
    kept = replace(config.generator, memory=Memory(encodings=str(tmp_path / "kept")))  # pyright: ignore[reportArgumentType]
    first = kept.load("cpu")
    first.prepare(PROMPTS)
    assert first._texts is not None
    made = first.encode(PROMPTS)
    assert first._texts is None
    load, loaded = picture.load_pipeline, []

    def spied(pipeline: str, model: str, **options: object) -> object:
        made = load(pipeline, model, **options)
        loaded.extend(name for name, part in made.components.items() if part is not None)
        return made

    monkeypatch.setattr(picture, "load_pipeline", spied)
    second = kept.load("cpu")
    second.prepare(PROMPTS)
    read = second.encode(PROMPTS)
    assert "transformer" in loaded and not {"text_encoder", "text_encoder_2"} & set(loaded)
    for one, two, three in zip(plain, made, read, strict=True):
        assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], three[name]) for name in one)
