"""From a TOML file to a typed ``msgspec.Struct``: every problem is found, and each is one line for a person.

A line says file, key, what is allowed and the value seen::

    configs/hv.toml: poll_interval_seconds must be greater than 0, got -1
    configs/hv.toml: unknown key 'store_config.cvs', did you mean 'csv'?

``build`` walks a Struct's fields itself instead of handing the whole to ``msgspec.convert``, which would stop
at the first problem, would not know units, and would not suggest a name. Single values are still converted
and checked by msgspec. Structs may add rules between fields in ``__post_init__``, by raising ``ConfigError``,
``ValueError`` or ``TypeError``.
"""

from __future__ import annotations

import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from edgedaq.errors import ConfigError, nearest
from edgedaq.units import Unit

__all__ = ["build", "read_toml"]

T = TypeVar("T", bound=msgspec.Struct)
_FAILED = object()
_PLAIN = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", bytes: "bytes"}


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a TOML file says.

    Raises:
        ConfigError: It cannot be read, or is not TOML; one line that names the file and, if known, the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        message = f"{path}: cannot be read: {e.strerror or e}"
        raise ConfigError(message) from e
    except UnicodeDecodeError as e:
        message = f"{path}: is not UTF-8 text (byte {e.start})"
        raise ConfigError(message) from e
    except tomllib.TOMLDecodeError as e:
        message = f"{path}: is not valid TOML: {_one_line(e)}"
        raise ConfigError(message) from e


def build(cls: type[T], raw: Mapping[str, Any], where: str) -> T:
    """Return a ``cls`` made of the values that a file gave.

    Args:
        raw: The file's content, as ``read_toml`` returned it.
        where: What to name in messages, e.g. ``configs/hv.toml``.

    Raises:
        ConfigError: Something is wrong; the message has one line for each problem, in the order of the file.
    """
    problems: list[str] = []
    value = _struct(cls, raw, "", problems)
    if problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    assert isinstance(value, cls)  # noqa: S101  # for mypy: no problem means that it was made
    return value


def _struct(cls: Any, raw: object, path: str, problems: list[str]) -> object:
    if isinstance(raw, cls):
        return raw
    if not isinstance(raw, Mapping):
        problems.append(f"{path} must be a section [{path}], got {raw!r}")
        return _FAILED
    prefix = f"{path}." if path else ""
    fields = {field.encode_name: field for field in msgspec.structs.fields(cls)}
    count = len(problems)
    values: dict[str, object] = {}
    for key, value in raw.items():
        field = fields.get(key)
        if field is None:
            problems.append(_unknown(prefix, key, value, fields))
        else:
            values[field.name] = _value(field.type, value, prefix + key, problems)
    for key, field in fields.items():
        if field.required and key not in raw:
            problems.append(f"{prefix}{key} is missing; it must be {_describe(field.type)}")
    if len(problems) > count:
        return _FAILED
    try:
        return cls(**values)
    except ConfigError as e:
        problems += [f"{path}: {line}" if path else line for line in str(e).splitlines()]
    except (ValueError, TypeError) as e:
        problems.append(f"{path}: {_one_line(e)}" if path else _one_line(e))
    return _FAILED


def _unknown(prefix: str, key: str, value: object, fields: Mapping[str, object]) -> str:
    hint = nearest(key, fields)
    if not hint:
        hint = f", known: {', '.join(sorted(fields))}"
    if isinstance(value, Mapping):
        return f"unknown section [{prefix}{key}]{hint}"
    return f"unknown key {prefix + key!r}{hint}"


def _value(kind: Any, value: object, path: str, problems: list[str]) -> object:
    """Convert one value to its type; on a problem, add a line and return ``_FAILED``."""
    base, metas = _strip(kind)
    origin = get_origin(base)
    if origin in (Union, types.UnionType):
        return _union(base, value, path, problems)
    if isinstance(base, type) and issubclass(base, msgspec.Struct):
        return _struct(base, value, path, problems)
    if origin is dict and isinstance(value, Mapping):
        item = get_args(base)[1]
        return {str(key): _value(item, entry, f"{path}.{key}", problems) for key, entry in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        return _sequence(kind, base, value, path, problems)
    for meta in metas:
        if isinstance(meta, Unit):
            try:
                value = meta.parse(value)
            except ConfigError as e:
                problems.append(f"{path} {e}")
                return _FAILED
    return _leaf(kind, value, path, problems)


def _union(base: Any, value: object, path: str, problems: list[str]) -> object:
    if value is None and type(None) in get_args(base):
        return None
    members = [member for member in get_args(base) if member is not type(None)]
    if len(members) == 1:
        return _value(members[0], value, path, problems)
    attempts: list[list[str]] = []
    for member in members:
        attempt: list[str] = []
        converted = _value(member, value, path, attempt)
        if not attempt:
            return converted
        attempts.append(attempt)
    allowed = " or ".join(_describe(member) for member in members)
    problems.append(f"{path} must be {allowed}, got {value!r}")
    return _FAILED


def _sequence(kind: Any, base: Any, value: list[object], path: str, problems: list[str]) -> object:
    args = get_args(base)
    if not args or (get_origin(base) is tuple and args[-1] is not Ellipsis):
        return _leaf(kind, value, path, problems)
    count = len(problems)
    items = [_value(args[0], entry, f"{path}[{index}]", problems) for index, entry in enumerate(value)]
    if len(problems) > count:
        return _FAILED
    return tuple(items) if get_origin(base) is tuple else items


def _leaf(kind: Any, value: object, path: str, problems: list[str]) -> object:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        problems.append(f"{path} {_refusal(kind, value)}")
        return _FAILED


def _refusal(kind: Any, value: object) -> str:
    """Say which rule of its type a value breaks: the range if the type is right, else the type."""
    base, metas = _strip(kind)
    try:
        msgspec.convert(value, base)
    except msgspec.ValidationError:
        hint = ""
        if get_origin(base) is Literal and isinstance(value, str):
            hint = nearest(value, [str(item) for item in get_args(base)])
        return f"must be {_describe(base)}, got {value!r}{hint}"
    ranges = [text for meta in metas if isinstance(meta, msgspec.Meta) for text in _rules(meta)]
    return f"must be {' and '.join(ranges) or _describe(base)}, got {value!r}"


def _rules(meta: msgspec.Meta) -> list[str]:
    named = (
        (meta.gt, "greater than {}"),
        (meta.ge, "at least {}"),
        (meta.lt, "less than {}"),
        (meta.le, "at most {}"),
        (meta.multiple_of, "a multiple of {}"),
        (meta.pattern, "of the form {}"),
        (meta.min_length, "at least {} long"),
        (meta.max_length, "at most {} long"),
    )
    return [text.format(limit) for limit, text in named if limit is not None]


def _describe(kind: Any) -> str:
    base, metas = _strip(kind)
    for meta in metas:
        if isinstance(meta, Unit):
            return f"{meta.called} such as {meta.example}"
    origin = get_origin(base)
    if origin is Literal:
        return "one of " + ", ".join(f'"{item}"' for item in get_args(base))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in get_args(base) if member is not type(None))
    if origin in (list, tuple) or base in (list, tuple):
        args = get_args(base)
        return f"a list (each {_describe(args[0])})" if args else "a list"
    if origin is dict or base is dict or (isinstance(base, type) and issubclass(base, msgspec.Struct)):
        return "a section"
    return _PLAIN.get(base, getattr(base, "__name__", str(base)))


def _strip(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(kind) is Annotated:
        base, *metas = get_args(kind)
        return base, tuple(metas)
    return kind, ()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
