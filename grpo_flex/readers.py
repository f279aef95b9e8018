"""Prompts files of every kind, by suffix and content: plain text, JSON lines, CSV, Parquet, Hugging Face's datasets.

| kind | one prompt is | known by |
|---|---|---|
| plain text | a line | .txt, or any other suffix whose first line is no JSON object |
| JSON lines | {"text" or "prompt", "id"?, "reference"?, "tags"?}, or a line of GenEval's evaluation_metadata.jsonl | .jsonl, .ndjson, .json, or a first line that begins with "{" |
| CSV | a row below a header; UniGenBench's index, prompt_en, sub_dims_en, or columns named as the keys above | .csv, .tsv |
| Parquet | a row, with columns as in a CSV file | .parquet, or a folder of such files, read by name; needs pyarrow |
| datasets | the same | a folder that ``Dataset.save_to_disk`` wrote; needs datasets |

A prompt without an id gets the number of its line or row, so that ids stay as long as the file does.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_flex.types import Prompt

KINDS = (
    "plain text (.txt, one prompt a line), JSON lines (.jsonl), CSV (.csv, .tsv) or Parquet (.parquet, or a folder of such "
    "files or of one dataset that datasets' save_to_disk wrote)"
)
_TEXT_KEYS, _ID_KEYS = ("text", "prompt"), ("id", "index")
_TEST_POINTS = ("Testpoints", "考点")
"""What UniGenBench tests a prompt for, in its English and in its Chinese table."""

_DATASET = "state.json"
"""In a folder that ``Dataset.save_to_disk`` wrote."""


class Unreadable(ValueError):
    """A prompts file, or a line of it, that holds no prompt. The message names the place and the way out."""


def read(path: Path) -> list[Prompt]:
    """All prompts of a file or folder, in its order.

    Raises:
        Unreadable: not text, no columns of prompts, or a line or row that is no prompt (with its number).
        OSError, UnicodeDecodeError: the file cannot be read at all.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return list(_from_table(path, _folder_rows(path)))
    if suffix == ".parquet":
        return list(_from_table(path, _parquet_rows(path)))
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise Unreadable(f"'{path}' is no text file; it needs to be {KINDS}")
    if suffix in (".csv", ".tsv"):
        return list(_from_table(path, _csv_rows(path, text, "\t" if suffix == ".tsv" else ",")))
    if suffix in (".jsonl", ".ndjson", ".json") or (suffix != ".txt" and text.lstrip().startswith("{")):
        return [_from_json(line, number, f"{path}:{number}") for number, line in _lines(text)]
    return [Prompt(id=str(number), text=line) for number, line in _lines(text)]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, stripped line) of those that are not blank. Only a line feed ends a line, as in JSON lines."""
    return ((n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip())


# ---------------------------------------------------------------- JSON lines


def _from_json(line: str, number: int, where: str) -> Prompt:
    try:
        entry = json.loads(line)
        key = next((k for k in _TEXT_KEYS if k in entry), "text")
        return Prompt(
            id=str(number if entry.get("id") is None else entry["id"]),
            text=_checked(entry[key], key),
            reference=_reference(entry),
            tags=_tags(entry),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(
            f'{where} is no prompt ({error}); each line needs to be like {{"id": "p1", "text": "a red circle"}}'
        ) from error


def _checked(text: Any, key: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"{key}" is empty')
    return text


def _reference(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a verifier needs to know: ``reference``, or GenEval's objects to include and exclude."""
    geneval = {key: entry[key] for key in ("include", "exclude") if key in entry}
    reference = entry.get("reference") or geneval
    if not isinstance(reference, Mapping):
        raise ValueError('"reference" is no object')
    return reference


def _tags(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """``tags``, or GenEval's single ``tag``."""
    tags = entry.get("tags") or ([entry["tag"]] if "tag" in entry else [])
    if isinstance(tags, str):
        raise ValueError('"tags" is a text; it needs to be a list of texts')
    return tuple(map(str, tags))


# ---------------------------------------------------------------- tables


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except csv.Error as error:
        raise Unreadable(f"'{path}' is no {path.suffix[1:].upper()} file ({error})") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise Unreadable(
            f"'{path}' is a Parquet file, which needs pyarrow: pip install pyarrow, or save the prompts as JSON lines"
        ) from error
    try:
        yield from parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise Unreadable(f"'{path}' is no Parquet file ({str(error).splitlines()[0]})") from error


def _folder_rows(path: Path) -> Iterator[dict[str, Any]]:
    if shards := sorted(path.glob("*.parquet")):
        for shard in shards:
            yield from _parquet_rows(shard)
    elif (path / _DATASET).is_file():
        yield from _dataset_rows(path)
    else:
        parts = sorted(state.parent.name for state in path.glob(f"*/{_DATASET}"))
        there = f"; it holds the datasets {', '.join(parts)}: name one of them, as {path / parts[0]}" if parts else ""
        raise Unreadable(
            f"'{path}' is a folder, and needs to hold *.parquet files or what datasets' save_to_disk writes for one dataset"
            + (there or f"; or name a file: {KINDS}")
        )


def _dataset_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise Unreadable(
            f"'{path}' was written by datasets' save_to_disk, which needs datasets to be read: pip install datasets, or "
            "save the prompts as Parquet or JSON lines"
        ) from error
    try:
        rows = Dataset.load_from_disk(path).to_list()
    except (ValueError, LookupError, TypeError, OSError) as error:  # pyarrow's own errors are ValueErrors
        raise Unreadable(f"'{path}' is no dataset that can be read ({str(error).splitlines()[0]})") from error
    yield from rows


def _from_table(path: Path, rows: Iterator[dict[str, Any]]) -> Iterator[Prompt]:
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        column = _text_column(where, row)
        name = next((row[key] for key in _ID_KEYS if row.get(key) not in (None, "")), number)
        try:
            text, details = _checked(row[column], column), _details(row, column)
            yield Prompt(id=str(name), text=text, reference=_reference(details), tags=_tags(details))
        except (ValueError, TypeError, RecursionError) as error:
            raise Unreadable(f"{where} is no prompt ({error}); correct it, or take it out") from error


def _text_column(where: str, row: Mapping[str, Any]) -> str:
    """The column of prompts: text, prompt, or the only one that begins with "prompt_" (UniGenBench: prompt_en)."""
    named = [key for key in _TEXT_KEYS if key in row]
    found = named[:1] or [key for key in row if isinstance(key, str) and key.startswith("prompt_")]
    if len(found) != 1:
        what = f"several columns of prompts ({', '.join(found)})" if found else "no column of prompts"
        raise Unreadable(
            f"{where} has {what} among {', '.join(map(str, row))}; name the one to use 'text' in the header"
        )
    return found[0]


def _details(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    """Reference and tags of a row. UniGenBench keeps both in one column of JSON, sub_dims_en beside prompt_en."""
    details = row.get("sub_dims" + column.removeprefix("prompt")) if column.startswith("prompt") else None
    if details:
        described = json.loads(details) if isinstance(details, str) else details
        if not isinstance(described, Mapping):
            raise ValueError('"sub_dims" is no JSON object')
        return {"reference": described, "tags": next((described[k] for k in _TEST_POINTS if k in described), None)}
    return {key: _unpacked(key, row[key]) for key in ("reference", "tags", "tag") if row.get(key) not in (None, "")}


def _unpacked(key: str, value: Any) -> Any:
    """A CSV cell that holds a list or an object is JSON; a Parquet one has it as it is."""
    return json.loads(value) if isinstance(value, str) and key != "tag" else value
