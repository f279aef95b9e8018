"""Encodings of prompts, kept in a folder: the text encoders run once per text, and leave memory.

A file for each text, named by a hash of what its numbers depend on. Several processes may fill one folder: a file
appears whole or not at all, and whoever comes later finds it. Texts are encoded one by one, so that an encoding does not depend
on its neighbours in a batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from grpo_flex.generators.base import Conditioning


class Encodings:
    """Texts become conditionings, each encoded at most once where there is a folder.

    Args:
        folder: where they are kept; empty: nowhere, and each call encodes anew.
        key: what the numbers depend on besides the text (``fingerprint``).
        encode: the text encoders: one text to its conditioning, batch dimension 1.
        done: called when all that was wanted is there: the moment for the encoders to leave the device.
    """

    def __init__(self, folder: str, key: str, encode: Callable[[str], Conditioning], done: Callable[[], None]) -> None:
        self.folder = Path(folder) if folder else None
        self._key, self._encode, self._done = key, encode, done

    def __call__(self, texts: Sequence[str]) -> list[Conditioning]:
        """One conditioning for each text, on the CPU."""
        known = {text: self._read(text) for text in dict.fromkeys(texts)}
        missing = [text for text, conditioning in known.items() if conditioning is None]
        known |= {text: self._make(text) for text in missing}
        self._done()
        return [known[text] for text in texts]  # pyright: ignore[reportReturnType]

    def fill(self, texts: Iterable[str]) -> None:
        """See to it that all of these are kept. The encoders stay until the next call, for there may be more to fill."""
        for text in dict.fromkeys(texts):
            if not self._path(text).is_file():
                self._make(text)

    def _path(self, text: str) -> Path:
        assert self.folder is not None
        name = hashlib.blake2b(f"{self._key}\x1f{text}".encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, text: str) -> Conditioning | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.folder is None or not self._path(text).is_file():
            return None
        try:
            return load_file(self._path(text))
        except (SafetensorError, OSError):
            return None  # damaged, by a machine that died: it is made again

    def _make(self, text: str) -> Conditioning:
        from safetensors.torch import save

        made = {name: tensor.to("cpu").contiguous() for name, tensor in self._encode(text).items()}
        if self.folder is not None:
            path = self._path(text)
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(f".{uuid4().hex}")
            new.write_bytes(save(made))
            new.replace(path)
        return made


def fingerprint(model: str, *settings: Any) -> str:
    """What encodings depend on: the model's files and the settings of its text encoders.

    A Hub model is known by its commit, a folder by its path and by name, size and time of each of its text encoders'
    files: a model that was saved anew is another model.
    """
    home = Path(model).resolve() if Path(model).is_dir() else _snapshot(model)
    files = sorted(file for part in ("text_encoder*", "tokenizer*") for file in home.glob(f"{part}/*"))
    stats = [(str(file.relative_to(home)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    of_hub = home.parent.name == "snapshots"
    return json.dumps([model, home.name] if of_hub else [str(home), stats]) + json.dumps(settings, default=str)


def report(folder: str) -> str:
    """E.g. "1,200 encodings of prompts, 4.7 GB, in encodings": whatever lies there, of all models."""
    sizes = [file.stat().st_size for file in Path(folder).glob("*/*.safetensors")]
    return f"{len(sizes):,} encodings of prompts, {_size(sum(sizes))}, in {folder}"


def _snapshot(model: str) -> Path:
    """The folder of the commit that a Hub id was loaded from."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(model, "model_index.json")
    return Path(index).parent if isinstance(index, str) else Path(model)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
