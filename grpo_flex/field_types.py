"""The types of a configuration's fields: what is declared, whether a value is of it, and how to say so."""

from __future__ import annotations

import importlib
import math
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, Union


def is_part(value: Any) -> bool:
    """Whether a value is an object with fields of its own."""
    return is_dataclass(value) and not isinstance(value, type)


def hints(cls: type) -> dict[str, Any]:
    """Type hints of the plain fields; a variant's Protocol is not checked by name."""
    found: dict[str, Any] = {}
    for f in fields(cls):
        try:
            found[f.name] = typing.get_type_hints(
                types.SimpleNamespace(__annotations__={f.name: f.type}),
                vars(importlib.import_module(cls.__module__)),
            )[f.name]
        except NameError:  # a Protocol that is imported for type checkers only
            found[f.name] = Any
    return found


def fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(fits(v, args[0]) for v in value)
        return len(value) == len(args) and all(fits(v, a) for v, a in zip(value, args, strict=True))
    if origin is typing.Literal:
        return value in args
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if is_dataclass(hint):
        return isinstance(value, hint)  # pyright: ignore[reportArgumentType]
    return hint is not type(None) or value is None


def is_finite(value: Any) -> bool:
    """Whether a value holds no number that is infinite or NaN, by itself or in a tuple."""
    if isinstance(value, tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def spell(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}
    if hint in words:
        return words[hint]
    if is_dataclass(hint):
        return f"a {hint.__name__}(…)"  # pyright: ignore[reportAttributeAccessIssue]
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(spell, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        if args[1:] == (...,):
            return "a tuple, such as (one,)" if args[0] is Any else f"a tuple, each entry {spell(args[0])}"
        return f"({', '.join(map(spell, args))})"
    return str(hint).replace("typing.", "").replace("NoneType", "none")
