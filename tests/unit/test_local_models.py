"""A folder that is no whole model is refused by --dry-run, before torch is asked for a weight, and says what it lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from grpo_flex.__main__ import main

EXPERIMENT = "experiments/shapes_image_oracle.py"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def without_vae(model: Path) -> None:
    shutil.rmtree(model / "vae")


def of_another_class(model: Path) -> None:
    said = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(said | {"_class_name": "FluxKontextPipeline"}))


def damaged(model: Path) -> None:
    (model / "model_index.json").write_text("<html>")


def configurations_alone(model: Path) -> None:
    (model / "transformer" / WEIGHTS).unlink()


def half_loaded(model: Path) -> None:
    (model / "transformer" / WEIGHTS).rename(model / "transformer" / "a-00001-of-00002.safetensors")
    (model / INDEX).write_text(
        json.dumps({"weight_map": {"x": "a-00001-of-00002.safetensors", "y": "a-00002-of-00002.safetensors"}})
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (empty, "which has no readable model_index.json; give a folder written by FluxPipeline.save_pretrained"),
        (damaged, "which has no readable model_index.json"),
        (without_vae, "which has no vae; give a folder with the whole FluxPipeline"),
        (
            of_another_class,
            "which holds a FluxKontextPipeline; this generator needs a FluxPipeline: give one, such as black",
        ),
        (
            configurations_alone,
            "whose transformer has no weights, or not all that its index names: complete the download",
        ),
        (half_loaded, "whose transformer has no weights, or not all that its index names"),
    ],
)
def test_what_a_folder_lacks_is_said(
    broken: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    shutil.copytree("testbed/tiny_flux", tmp_path / "model")
    broken(tmp_path / "model")
    assert main(["train", EXPERIMENT, "--model", str(tmp_path / "model"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: generator.model is '{tmp_path}/model', ") and message in said


def test_an_index_with_all_its_files_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("testbed/tiny_flux", tmp_path / "model")
    half_loaded(tmp_path / "model")
    save_file({}, tmp_path / "model" / "transformer" / "a-00002-of-00002.safetensors")
    assert main(["train", EXPERIMENT, "--model", str(tmp_path / "model"), "--dry-run"]) == 0
    assert "Valid; nothing was started" in capsys.readouterr().out


def test_a_model_without_a_name_is_not_the_experiments_own(capsys: pytest.CaptureFixture[str]) -> None:
    """--model "$MODEL" with nothing in MODEL."""
    assert main(["train", EXPERIMENT, "--model", "", "--dry-run"]) == 2
    assert "generator.model is ''" in capsys.readouterr().err


@pytest.mark.parametrize("known", ["public", "cached"])
def test_a_hub_model_of_another_class_is_refused_without_the_hub(
    known: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    if known == "cached":
        model, files = "somebody/her-wan", tmp_path / "models--somebody--her-wan"
        for name, text in {
            "refs/main": "abc",
            "snapshots/abc/model_index.json": '{"_class_name": "WanPipeline"}',
        }.items():
            (files / name).parent.mkdir(parents=True)
            (files / name).write_text(text)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["train", EXPERIMENT, "--model", model, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: generator.model is '{model}', which holds a WanPipeline; this generator needs a Flux"
    )


def test_a_hub_model_that_nothing_is_known_of_is_left_to_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", EXPERIMENT, "--model", "somebody/her-flux", "--dry-run"]) == 0
    assert "Valid; nothing was started" in capsys.readouterr().out
