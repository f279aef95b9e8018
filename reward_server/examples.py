"""What both stages of a judge's training learn from: lines of a file, as a request, replies and pictures.

TRL's collators take a request as text, a reply as text and the pictures, so what is ours is to render the request by the
family that will ask the served judge.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# transformers annotates processors by their most general classes.
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLProcessor

from reward_server.families.base import ChatFamily, Medium
from reward_server.judge_training import JudgeTraining
from reward_server.preferences import is_video, pictures

if TYPE_CHECKING:
    from datasets import Dataset

_REQUEST = ("prompt", "media", "question")
"""What a line says that is no reply."""


def read_lines(
    path: str | Path, wanted: Sequence[str], questions: Mapping[str, ChatFamily] | None = None
) -> list[dict[str, Any]]:
    """The JSON lines of a file, with "media" as paths that exist.

    Args:
        wanted: Keys that hold a text in every line.
        questions: What a line may name as its "question".

    Raises:
        ValueError: no such file, or a line that is no object with the wanted keys, that asks what is not known, or that
            names media that are not there.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    text = Path(path).read_text(encoding="utf-8").removesuffix("\n")
    made = []
    # Not splitlines(), which also ends a line at U+2028 and its like, and these stand in people's prompts.
    for number, line in enumerate(text.split("\n") if text else (), 1):
        try:
            row = _row(line, wanted, Path(path).parent)
            _check_shown(row["media"], row.get("question") or "", questions or {})
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        made.append(row)
    return made


def _row(line: str, wanted: Sequence[str], folder: Path) -> dict[str, Any]:
    """The object of a line, its media beside the file. Raises ValueError where a key lacks or has another type."""
    try:
        row = json.loads(line)
        media = [[str(folder / one) for one in paths] for paths in row["media"]]
        missing = [name for name in wanted if not isinstance(row[name], str)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__} {error}; it needs {wanted}, media") from error
    if missing:
        raise ValueError(f"{missing[0]} is no text")
    return row | {"media": media}


def _check_shown(media: Sequence[Sequence[str]], question: str, questions: Mapping[str, ChatFamily]) -> None:
    """Raises ValueError where the media are not there, or not those that the question is asked about."""
    if not isinstance(question, str) or (question and question not in questions):
        raise ValueError(f"the question {question!r} is none of the training's questions: {sorted(questions)}")
    if absent := [one for paths in media for one in paths if not Path(one).is_file()]:
        raise ValueError(f"{absent[0]!r} is not there")
    family = questions.get(question)
    shown = family.sources + family.candidates if family else 2
    if len(media) != shown or not all(media):
        raise ValueError(f"media are {media}; it needs {shown} lists of paths, none of them empty")
    if family and family.medium != medium_of(media[0]):
        raise ValueError(f"the question {question!r} is about {family.medium}s, and media are {media}")


class FramesProcessor(Qwen3VLProcessor):
    """Qwen3-VL's and Qwen3.5's processor without its video half: judges see a video as frames.

    The video half cannot be loaded without torchvision, and nothing here needs it.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def load_processor(folder: Path) -> FramesProcessor:
    """The folder's tokenizer, chat template and picture processor.

    Raises:
        ValueError: a folder without a chat template, which is what turns a request into text.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise ValueError(f"the model folder {str(folder)!r} has no chat template: a judge is asked by chat")
    images = AutoImageProcessor.from_pretrained(folder)
    return FramesProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def rendered(processor: FramesProcessor, family: ChatFamily, prompt: str, shown: Sequence[int]) -> str:
    """The request as the server renders it, up to where the reply begins.

    Args:
        shown: Pictures of each candidate: (1, 1), or the numbers of frames.
    """
    (message,) = family.request(prompt, [[""] * count for count in shown])
    # As vLLM hands it to the template: a picture is a mark, its data goes another way.
    content = [{"type": "image"} if part["type"] == "image_url" else part for part in message["content"]]
    options = family.options().get("chat_template_kwargs", {})
    return processor.apply_chat_template(
        [message | {"content": content}], tokenize=False, add_generation_prompt=True, **options
    )


def ended(processor: FramesProcessor, reply: str) -> str:
    """The reply with the token that ends it, as the judge has to write it."""
    return reply + processor.tokenizer.eos_token


def dataset(config: JudgeTraining, processor: FramesProcessor, rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Examples as TRL takes them: request and replies as text, pictures read when their turn comes.

    Args:
        rows: Each with "prompt", "media" (a list of paths for each candidate, in the order shown), "question" where it
            does not compare, and one or several replies under other names, which are given their end.

    Raises:
        ValueError: no rows, a chat template that ends a reply otherwise, or a text with one of its marks.
    """
    from datasets import Dataset

    if not rows:
        raise ValueError("there is nothing to train on: the file holds no usable examples")
    _check_end(config, processor)
    marks = processor.tokenizer.all_special_tokens
    for row in rows:
        found = [mark for name in row if name not in ("media", "question") for mark in marks if mark in row[name]]
        if found:
            raise ValueError(f"the instance with the prompt {row['prompt'][:60]!r} has the mark {found[0]!r} in a text")

    def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        made = [example(config, processor, row) for row in rows]
        return {name: [one[name] for one in made] for name in made[0]}

    return Dataset.from_list([dict(row) for row in rows]).with_transform(read)


def example(config: JudgeTraining, processor: FramesProcessor, row: Mapping[str, Any]) -> dict[str, Any]:
    """One row with its request rendered, its pictures in the order shown, and its replies ended."""
    family = config.family(medium_of(row["media"][0]), row.get("question") or "")
    shown = [pictures(paths, family.frames) for paths in row["media"]]
    request = rendered(processor, family, row["prompt"], [len(frames) for frames in shown])
    replies = {name: ended(processor, row[name]) for name in row if name not in _REQUEST}
    return {"prompt": request, "images": [frame for frames in shown for frame in frames]} | replies


def medium_of(paths: Sequence[str]) -> Medium:
    """A candidate of several frames, or of one video file, is a video."""
    return "video" if len(paths) > 1 or is_video(paths[0]) else "image"


def _check_end(config: JudgeTraining, processor: FramesProcessor) -> None:
    """Raises ValueError if the template does not end an assistant's turn as ``ended`` does."""
    options = config.image.options().get("chat_template_kwargs", {})
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "{}"}]
    whole = processor.apply_chat_template(turns, tokenize=False, **options)
    if not whole.rstrip().endswith(ended(processor, "{}")):
        raise ValueError(
            f"the chat template ends a reply with {whole[-30:]!r}, and the tokenizer's end is "
            f"{processor.tokenizer.eos_token!r}: the judge would not learn to stop"
        )
