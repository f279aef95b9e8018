"""Overrides: "dotted.field=value" from the command line or an experiment file, applied strictly."""

from __future__ import annotations

import ast
import difflib
import typing
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from grpo_flex.config import ConfigError
from grpo_flex.field_types import fits, hints, is_part, spell

C = TypeVar("C")


def override(config: C, assignments: Sequence[str]) -> C:
    """Apply "dotted.field=value" strings, strictly.

    >>> override(Optimizer(), ["lr=1e-5"]).lr
    1e-05

    Raises:
        ConfigError: an unknown field (with the nearest known name), or a value of another type.
    """
    for assignment in assignments:
        path, sep, text = assignment.partition("=")
        if not sep:
            raise ConfigError(f"'{assignment}' is not an override; write field=value, e.g. optimizer.lr=1e-5")
        config = _assign(config, path.split("."), text, path)
    return config


def _assign(part: Any, names: list[str], text: str, path: str) -> Any:
    name, *rest = names
    known = [f.name for f in fields(part)]
    if name not in known:
        parent = path[: len(path) - len(".".join(names))]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{parent}{near[0]}'?" if near else f"known here: {', '.join(parent + k for k in known)}"
        raise ConfigError(f"no config field '{parent}{name}'; {hint}")
    value = getattr(part, name)
    nested = is_part(value)
    if rest and _holds_parts(value):
        return replace(part, **{name: _assign_entry(value, rest, text, path)})
    if rest and not nested:
        instead = "; put an object there in the experiment file" if value is None and _may_be_none(part, name) else ""
        raise ConfigError(f"'{path}' goes too deep: '{name}' is {value!r}, which has no fields{instead}")
    if rest:
        return replace(part, **{name: _assign(value, rest, text, path)})
    if nested and text.lower() == "none" and _may_be_none(part, name):
        return replace(part, **{name: None})
    if nested:
        inner = ", ".join(f"{path}.{f.name}" for f in fields(value))
        raise ConfigError(
            f"'{path}' is a {type(value).__name__} object; set one of its fields ({inner or 'it has none'}), or choose another object in the experiment file"
        )
    return replace(part, **{name: _read(text, hints(type(part))[name], path)})


def _assign_entry(entries: tuple[Any, ...], names: list[str], text: str, path: str) -> tuple[Any, ...]:
    """A field of an object in a tuple, e.g. scorers.0.model."""
    number, *rest = names
    if not number.isdigit() or int(number) >= len(entries) or not rest or not is_part(entries[int(number)]):
        parent = path[: len(path) - len(".".join(names))]
        known = [f"{parent}{i}.{name}" for i, entry in enumerate(entries) for name in _field_names(entry)]
        raise ConfigError(f"no config field '{path}'; known here: {', '.join(known)}")
    i = int(number)
    return (*entries[:i], _assign(entries[i], rest, text, path), *entries[i + 1 :])


def _holds_parts(value: Any) -> bool:
    return isinstance(value, tuple) and any(map(is_part, value))


def _field_names(value: Any) -> list[str]:
    return [f.name for f in fields(value)] if is_part(value) else []


def _may_be_none(part: Any, name: str) -> bool:
    return next(f.default for f in fields(part) if f.name == name) is None


def _listed(text: str) -> tuple[str, ...]:
    """a,b as a shell's user writes a list; what has brackets or quotes of its own is one text."""
    return (text,) if set("([{'\"") & set(text) else tuple(part.strip() for part in text.split(",") if part.strip())


def _read(text: str, hint: Any, path: str) -> Any:
    if hint is str:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if typing.get_origin(hint) is tuple:
        value = tuple(value) if isinstance(value, list | tuple) else (value,)
        if typing.get_args(hint) == (str, ...) and (value == (text,) or not fits(value, hint)):
            value = _listed(text)
    if not fits(value, hint):
        raise ConfigError(f"{path}={text}: '{path}' needs {spell(hint)}")
    return value
