"""Settings from a TOML or JSON file and from the command line, checked against a dataclass before anything starts.

A dataclass is the whole description: its field names are the settings, its annotations their types, and a nested
dataclass is a section. Unknown names and impossible values are refused with the name of the file or option.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.errors import InvalidSettings

Settings = TypeVar("Settings")


def load_settings(kind: type[Settings], path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Read settings.

    Args:
        kind: a frozen dataclass.
        path: a `.toml` or `.json` file; None for defaults and overrides alone.
        overrides: `section.name=value`, the value in TOML's or as plain text.

    Raises:
        InvalidSettings: naming the setting.
    """
    values = {} if path is None else _read(path)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise InvalidSettings(f"{override!r} is no setting: write section.name=value.")
        _put(values, name.strip().split("."), _parse(text.strip()), name)
    return build(kind, values, "" if path is None else f" in {path.name}")


def build(kind: type[Settings], values: Mapping[str, Any], where: str = "", section: str = "") -> Settings:
    """A settings object out of nested dictionaries, or `InvalidSettings`."""
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {section}{close[0]}?" if close else f"; there are {', '.join(known)}."
            raise InvalidSettings(f"{section}{name}{where} is no setting{hint}")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise InvalidSettings(f"The setting {section}{name} is missing{where}.")
    converted = {name: _convert(hints[name], value, f"{section}{name}", where) for name, value in values.items()}
    return kind(**converted)


def as_plain(settings: Any) -> dict[str, Any]:
    """Nested dictionaries that JSON can hold and `build` takes."""
    return json.loads(json.dumps(asdict(settings)))


def first_difference(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> str | None:
    """Name and both values of the first setting that differs, as a piece of a sentence."""
    for name in sorted({*saved, *current}):
        old, new = saved.get(name), current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            if found := first_difference(old, new, f"{prefix}{name}."):
                return found
        elif old != new:
            return f"{prefix}{name} was {old!r} and is now {new!r}"
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise InvalidSettings(f"There is no settings file {path}.") from error
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"The settings file {path.name} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else repr(values)
        raise InvalidSettings(f"The settings file {path.name} holds {kind}, but must hold sections.")
    return values


def _put(values: dict[str, Any], names: list[str], value: Any, shown: str) -> None:
    for name in names[:-1]:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise InvalidSettings(f"{shown} is no setting: {name} has no parts.")
    values[names[-1]] = value


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _convert(hint: Any, value: Any, name: str, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (hint,) = [argument for argument in arguments if argument is not NoneType]
        return _convert(hint, value, name, where)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InvalidSettings(f"{name} is {value!r}{where}, but must be a section.")
        return build(hint, value, where, f"{name}.")  # type: ignore[type-var]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InvalidSettings(f"{name} is {value!r}{where}, but must be a list.")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise InvalidSettings(f"{name} is {value!r}{where}, but must be a list of {len(arguments)}.")
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_convert(part, entry, name, where) for part, entry in zip(inner, value, strict=True))
    if origin is Literal:
        if value not in arguments:
            raise InvalidSettings(f"{name} is {value!r}{where}, but must be one of {', '.join(map(str, arguments))}.")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise InvalidSettings(f"{name} is {value!r}{where}, but must be {kinds[hint]}.")
    return value
