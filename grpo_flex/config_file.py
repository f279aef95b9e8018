"""Configurations and files: experiments are imported; what a run used is written as JSON and read back by a resume."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import json
import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.field_types import is_part

_EXPERIMENT = "_experiment_"
"""Begins the module name of an experiment file, which nothing else can import."""


def load_experiment(path: str | Path) -> RunConfig:
    """Import an experiment file and call its ``config()``.

    Raises:
        ConfigError: no such file (with the nearest existing one), no ``config()``, or it returns something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no experiment file '{path}'; {_nearest_file(path)}")
    spec = importlib.util.spec_from_file_location(_EXPERIMENT + path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"'{path}' is no experiment: an experiment is a Python file, its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "config"):
            raise ConfigError(f"{path} has no function config(); an experiment defines `def config() -> RunConfig`")
        made = module.config()
    except (SyntaxError, ImportError, TypeError, NameError, AttributeError) as error:
        raise ConfigError(f"{path} makes no configuration: {type(error).__name__}: {error}") from error
    if not isinstance(made, RunConfig):
        raise ConfigError(f"config() in {path} returns {type(made).__name__}; it needs to return a RunConfig")
    return made


def _nearest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("experiments")
    there = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1) or difflib.get_close_matches(path.name + ".py", there, n=1)
    if near:
        return f"did you mean '{folder / near[0]}'?"
    return f"{folder} holds: {', '.join(there)}" if there else "give the path of an experiment file"


def to_json(config: Any) -> str:
    """The resolved configuration as JSON; every object carries its class under "type"."""
    return json.dumps(_plain(config), indent=2)


def _plain(value: Any) -> Any:
    if is_part(value):
        return {"type": _address(type(value))} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, types.FunctionType):
        return {"function": _address(value)}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ConfigError(
        f"{value!r} cannot be written to config.json: a configuration holds dataclasses, functions of a module, "
        "numbers, texts and tuples"
    )


def _address(named: Any) -> str:
    """Where a class or function can be imported from again: "module:name".

    Raises:
        ConfigError: nowhere, because it is local to a function or to the experiment file.
    """
    module, name = named.__module__, named.__qualname__
    if "<" in name or module.startswith(_EXPERIMENT):
        raise ConfigError(
            f"'{name}' cannot be imported again from config.json by a resume; define it at the top of a module "
            "that the experiment imports"
        )
    return f"{module}:{name}"


def from_json(text: str) -> RunConfig:
    """The inverse of ``to_json``.

    Raises:
        ConfigError: not JSON, no run's configuration, a class that no longer exists, or fields that it no longer has.
    """
    try:
        made = _revive(json.loads(text))
    except (json.JSONDecodeError, ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"config.json does not fit this version of the code: {error}") from error
    if not isinstance(made, RunConfig):
        raise ConfigError("config.json is not that of a run: it holds something else")
    return made


def _revive(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_revive(v) for v in value)
    if isinstance(value, dict) and set(value) == {"function"}:
        return _imported(value["function"])
    if isinstance(value, dict) and "type" in value:
        cls = _imported(value["type"])
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise ConfigError(f"config.json names {value['type']}, which is not a configuration class")
        return cls(**{k: _revive(v) for k, v in value.items() if k != "type"})
    if isinstance(value, dict):
        return {k: _revive(v) for k, v in value.items()}
    return value


def _imported(address: str) -> Any:
    module, _, name = address.partition(":")
    return getattr(importlib.import_module(module), name)
