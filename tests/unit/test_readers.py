"""Prompts files of every kind, the layouts of UniGenBench and GenEval, and hostile ones."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_flex.config import ConfigError
from grpo_flex.prompts import read_prompts
from grpo_flex.readers import Unreadable, read
from grpo_flex.types import Prompt

DIMENSIONS = {
    "en": {"Primary Categories": "Art", "Testpoints": ["Style", "Attribute - Color"], "Subjects": "Scene"},
    "zh": {"一级垂类": "艺术", "主体": "场景", "考点": ["风格", "属性-数量"], "考点对应描述": ["水墨画", "两只熊猫"]},
}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def table(folder: Path, rows: list[dict[str, Any]], name: str = "p.csv", delimiter: str = ",") -> Path:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


@pytest.mark.parametrize("name", ["p.txt", "prompts", "p.prompts"])
def test_plain_text_is_one_prompt_a_line(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, name, "\ufeffa red circle\r\n\r\n  two cats, \u2028 asleep \n")
    assert read(file) == [Prompt(id="1", text="a red circle"), Prompt(id="3", text="two cats, \u2028 asleep")]


def test_a_first_line_of_json_makes_json_lines_of_any_suffix(tmp_path: Path) -> None:
    assert read(written(tmp_path, "prompts", '\n{"text": "x"}'))[0] == Prompt(id="2", text="x")
    assert read(written(tmp_path, "p.txt", '{"text": "x"}'))[0].text == '{"text": "x"}'


def test_genevals_metadata(tmp_path: Path) -> None:
    line = {
        "tag": "counting",
        "include": [{"class": "bird", "count": 2}],
        "exclude": [{"class": "bird", "count": 3}],
        "prompt": "a photo of two birds",
    }
    (prompt,) = read(written(tmp_path, "evaluation_metadata.jsonl", json.dumps(line)))
    wanted = {"include": line["include"], "exclude": line["exclude"]}
    assert prompt == Prompt(id="1", text="a photo of two birds", reference=wanted, tags=("counting",))


@pytest.mark.parametrize(("language", "tags"), [("en", ("Style", "Attribute - Color")), ("zh", ("风格", "属性-数量"))])
def test_unigenbenchs_table(tmp_path: Path, language: str, tags: tuple[str, ...]) -> None:
    described = DIMENSIONS[language]
    details = json.dumps(described, ensure_ascii=False)
    rows = [{"index": i, f"prompt_{language}": f'a "{i}",\nb', f"sub_dims_{language}": details} for i in (0, 7)]
    first, second = read(table(tmp_path, rows))
    assert first == Prompt(id="0", text='a "0",\nb', reference=described, tags=tags)
    assert second.id == "7"


def test_a_table_with_our_own_columns(tmp_path: Path) -> None:
    rows = [{"text": "x", "tags": '["a"]', "reference": '{"n": 1}', "other": "?"}]
    assert read(table(tmp_path, rows, "p.tsv", "\t")) == [Prompt(id="1", text="x", reference={"n": 1}, tags=("a",))]


def test_parquet_is_a_table_too(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": "x", "tags": ["a"]}, {"prompt": "y", "tags": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet") == [Prompt(id="1", text="x", tags=("a",)), Prompt(id="2", text="y")]
    with pytest.raises(Unreadable, match="is no Parquet file"):
        read(written(tmp_path, "q.parquet", "PAR1 nonsense"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    file = written(tmp_path, "p.parquet", b"PAR1")
    with pytest.raises(ConfigError, match=r"prompts\.train: .*needs pyarrow: pip install pyarrow, or save"):
        read_prompts(str(file), "prompts.train")


def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for name in ("train-1", "train-0", "train-2"):
        parquet.write_table(
            pyarrow.Table.from_pylist([{"prompt": f"{name}{i}"} for i in "ab"]), tmp_path / f"{name}.parquet"
        )
    written(tmp_path, "README.md", "the data's card")
    texts = ["train-0a", "train-0b", "train-1a", "train-1b", "train-2a", "train-2b"]
    expected = [Prompt(id=str(number), text=text) for number, text in enumerate(texts, 1)]
    assert read_prompts(str(tmp_path), "prompts.train") == expected
    written(tmp_path, "train-3.parquet", "PAR1 nonsense")
    with pytest.raises(ConfigError, match=r"prompts\.train: '.*train-3.parquet' is no Parquet file"):
        read_prompts(str(tmp_path), "prompts.train")


def test_a_saved_dataset_is_a_table_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": "x", "tags": ["a"], "reference": {"n": 1}}, {"prompt": "y", "tags": None, "reference": None}]
    data = Dataset.from_list(rows)
    DatasetDict({"test": data, "train": data}).save_to_disk(tmp_path / "saved")
    expected = [Prompt(id="1", text="x", tags=("a",), reference={"n": 1}), Prompt(id="2", text="y")]
    assert read_prompts(str(tmp_path / "saved" / "train"), "prompts.train") == expected
    with pytest.raises(ConfigError, match=r"it holds the datasets test, train: name one of them, as .*saved/test"):
        read_prompts(str(tmp_path / "saved"), "prompts.train")
    for damage in ("{}", "{", '{"_data_files": [{"filename": "gone"}]}'):
        written(tmp_path / "saved" / "test", "state.json", damage)
        with pytest.raises(ConfigError, match=r"prompts\.train: '.*test' is no dataset that can be read"):
            read_prompts(str(tmp_path / "saved" / "test"), "prompts.train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigError, match=r"prompts\.train: .*needs datasets to be read: pip install datasets, or save"
    ):
        read_prompts(str(tmp_path / "saved" / "train"), "prompts.train")


def test_another_folder_is_told_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"is a folder, and needs to hold \*\.parquet files or .*; or name a file: plain"
    ):
        read_prompts(str(tmp_path), "prompts.train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "", "holds no prompts"),
        ("p.csv", "text\n", "holds no prompts"),
        ("p.csv", "words\nx", "row 1 has no column of prompts among words; name the one to use 'text'"),
        ("p.csv", "prompt_en,prompt_zh\nx,y", r"several columns of prompts \(prompt_en, prompt_zh\)"),
        ("p.csv", 'text\nx\n" "', r'row 2 is no prompt \("text" is empty\)'),
        ("p.csv", "prompt_en,sub_dims_en\nx,{", "row 1 is no prompt"),
        ("p.csv", 'prompt_en,sub_dims_en\nx,"[1]"', '"sub_dims" is no JSON object'),
        ("p.csv", "text,tags\nx,a", "row 1 is no prompt"),
        ("p.csv", 'text\n"x', "is no CSV file"),
        ("p.csv", b"\xff\xfe", "cannot be read"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.txt", b"x\0y", "is no text file; it needs to be plain text"),
        ("p.jsonl", '{"text": "x", "reference": [1]}', '"reference" is no object'),
        ("p.jsonl", '{"text": "x", "tags": "ab"}', '"tags" is a text'),
        ("p.jsonl", "[" * 100_000, "p.jsonl:1 is no prompt"),
        ("p.jsonl", '{"prompt": null}', '"prompt" is empty'),
    ],
)
def test_what_is_no_prompt_is_named_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompts(str(written(tmp_path, name, content)), "prompts.train")


@given(content=st.binary(max_size=200), suffix=st.sampled_from(["", ".txt", ".jsonl", ".csv", ".tsv", ".parquet"]))
def test_any_bytes_are_prompts_or_a_named_complaint(
    content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = written(tmp_path_factory.getbasetemp(), "any" + suffix, content)
    try:
        prompts = read_prompts(str(file), "prompts.train")
    except ConfigError as error:
        assert "prompts.train" in str(error)
    else:
        assert prompts and all(p.text.strip() and p.id for p in prompts)
