"""Configuration: frozen dataclasses written to JSON and read back strictly.

A run's configuration is the record of what was run, so nothing in it may be guessed: an unknown key, a value
of the wrong type or a NaN is refused with the full path of the field (``train.batch_size``), the value found
and what would have been right. The field types understood are int, float, str, bool, Literal, tuple, another
dataclass, and any of these "or None".
"""

import dataclasses
import functools
import json
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fathom.files import atomic_write

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, the value and what would be right."""


def check(right: bool, name: str, value: object, expected: str) -> None:
    """Raises a ConfigError that names the field, its value and what would be right, unless `right`."""
    if not right:
        raise ConfigError(f"{name} is {value!r}; it must be {expected}")


def renamed_fields(**current: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: `old="new"` keeps a field's old name working for one release, with a DeprecationWarning.

    It works as a keyword of the constructor, as an attribute, as a JSON key and, by `current_flags`, as a flag. Giving
    both names is an error, so `dataclasses.replace`, which passes every field, takes current names alone.
    """

    def decorate(cls: type[T]) -> type[T]:
        construct = cls.__init__

        @functools.wraps(construct)
        def with_old_names(self: T, *args: Any, **kwargs: Any) -> None:
            construct(self, *args, **_with_current_names(cls, kwargs))

        cls.__init__ = with_old_names  # type: ignore[assignment]
        cls._renamed_fields = current  # type: ignore[attr-defined]
        for old, new in current.items():
            setattr(cls, old, property(functools.partial(_old_attribute, old=old, new=new)))
        return cls

    return decorate


def current_flags(cls: type, words: Sequence[str], prefix: str = "") -> list[str]:
    """Command-line words for `cls` with every renamed field's old flag replaced; `prefix` is that of its flags.

    Flags are matched as tyro does: `_` for `-`, `--flag=value`, and `--no-flag` for a boolean. Raises ConfigError where
    the current flag is given, too.
    """
    found = list(words)
    for old, new in getattr(cls, "_renamed_fields", {}).items():
        for negation in ("", "no-"):
            old_flag, new_flag = (f"--{prefix}{negation}{name}".replace("_", "-") for name in (old, new))
            flags = [word.partition("=")[0].replace("_", "-") for word in found]
            if old_flag in flags and new_flag in flags:
                raise ConfigError(f"{old_flag} is the old name of {new_flag}, which is given too; leave it out")
            for index, flag in enumerate(flags):
                if flag == old_flag:
                    _warn_renamed(old_flag, new_flag)
                    found[index] = "".join((new_flag, *found[index].partition("=")[1:]))
    hints = get_type_hints(cls)
    for field in fields(cls):
        inner, _ = _split_none(hints[field.name])
        if is_dataclass(inner):
            found = current_flags(cast(type, inner), found, f"{prefix}{field.name}.")
    return found


def to_json(obj: "DataclassInstance") -> dict[str, Any]:
    """The dataclass ``obj`` as plain JSON values: objects, lists, strings, numbers, booleans and null."""
    data: dict[str, Any] = _plain(obj)
    # What is written must be readable. To find out now costs microseconds; at resume time it costs a run.
    from_json(type(obj), data, where=type(obj).__name__)
    return data


def from_json(cls: type[T], data: object, where: str = "config") -> T:
    """Builds a ``cls`` from plain JSON values; error messages begin with ``where``, the place they came from.

    Absent keys take the field's default. An int is accepted for a float; a bool never passes for an int.
    """
    result: T = _read_dataclass(cls, data, _Place(where))
    return result


def save_json(obj: "DataclassInstance", path: Path) -> None:
    """Writes ``obj`` to ``path`` so that a reader finds the old file or the new one, never half of one."""
    atomic_write(path, json.dumps(to_json(obj), indent=2) + "\n")


def load_json(cls: type[T], path: Path) -> T:
    """Reads a ``cls`` back from the JSON file at ``path``; errors name the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a duplicate key, bytes that are not UTF-8, or endless brackets
        raise ConfigError(f"{path}: {error}") from error
    return from_json(cls, data, where=str(path))


# --- reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where in which configuration we are reading: what an error message starts with."""

    where: str
    path: str = ""

    def field(self, name: str) -> "_Place":
        return _Place(self.where, f"{self.path}.{name}" if self.path else name)

    def item(self, index: int) -> "_Place":
        return _Place(self.where, f"{self.path}[{index}]")

    def error(self, problem: str) -> ConfigError:
        return ConfigError(": ".join(part for part in (self.where, self.path, problem) if part))

    def wrong(self, value: object, expected: str) -> ConfigError:
        return self.error(f"got {value!r:.80}, expected {expected}")


def _read(hint: Any, value: Any, place: _Place) -> Any:
    """``value`` as the type ``hint``, or a ConfigError."""
    inner, optional = _split_none(hint)
    if value is None and optional:
        return None
    if is_dataclass(inner):
        return _read_dataclass(inner, value, place)
    if get_origin(inner) is tuple:
        return _read_tuple(hint, inner, value, place)
    if not _is_scalar(inner, value):
        raise place.wrong(value, _describe(hint))
    return float(value) if inner is float else value


def _read_dataclass(cls: Any, value: object, place: _Place) -> Any:
    if not isinstance(value, Mapping):
        raise place.wrong(value, _describe(cls))
    known = {field.name: field for field in fields(cls) if field.init}
    value = _with_current_names(cls, value, place)
    for key in value:
        if key not in known:
            raise place.field(str(key)).error(f"unknown key{_suggest(str(key), list(known))}")
    hints = get_type_hints(cls)
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise place.field(name).error(f"missing, expected {_describe(hints[name])}")
    arguments = {name: _read(hints[name], value[name], place.field(name)) for name in known if name in value}
    try:
        return cls(**arguments)
    except ValueError as error:  # the dataclass checks its own values in __post_init__
        raise place.error(str(error)) from error


def _with_current_names(cls: Any, values: Mapping[Any, Any], place: _Place | None = None) -> dict[Any, Any]:
    """The values with renamed fields under their current names; `place` is where a configuration is read."""
    current, result = getattr(cls, "_renamed_fields", {}), {}
    for key, value in values.items():
        new = current.get(key, key)
        if new != key:
            if new in values:
                problem = f"is the old name of {new}, which is given too; leave it out"
                raise place.field(key).error(problem) if place else TypeError(f"{key} {problem}")
            _warn_renamed(f"{place.where}: {place.field(key).path}" if place else key, new)
        result[new] = value
    return result


def _old_attribute(self: Any, old: str, new: str) -> Any:
    _warn_renamed(old, new)
    return getattr(self, new)


def _warn_renamed(old: str, new: str) -> None:
    """Warn at the line that uses the old name: the first that is neither in this file nor in `dataclasses`."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename in (__file__, dataclasses.__file__):
        frame, level = frame.f_back, level + 1
    message = f"{old} is now called {new}; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def _read_tuple(hint: Any, inner: Any, value: object, place: _Place) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise place.wrong(value, _describe(hint))
    items = get_args(inner)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise place.wrong(value, _describe(hint))
    return tuple(_read(item, entry, place.item(i)) for i, (item, entry) in enumerate(zip(items, value, strict=True)))


def _is_scalar(hint: Any, value: object) -> bool:
    """Whether ``value`` has the scalar type ``hint``. Python's True is an int, and equals 1; ours is not."""
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if hint is float:
        # A comparison, as math.isfinite refuses integers too large for any float.
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    raise TypeError(f"a configuration field cannot have the type {hint}")


# --- types -----------------------------------------------------------------------------------------------


def _split_none(hint: Any) -> tuple[Any, bool]:
    """``X | None`` as (X, True), any other type X as (X, False)."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    members = [member for member in get_args(hint) if member is not type(None)]
    if len(members) != 1:
        raise TypeError(f"a configuration field may be 'X | None', no other union: {hint}")
    return members[0], True


def _describe(hint: Any) -> str:
    """The type in words, as an error message needs it."""
    inner, optional = _split_none(hint)
    words = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
    if optional:
        return f"{_describe(inner)} or null"
    if is_dataclass(inner):
        return f"an object with the fields of {getattr(inner, '__name__', inner)}"
    if get_origin(inner) is Literal:
        return "one of " + ", ".join(json.dumps(choice) for choice in get_args(inner))
    if get_origin(inner) is tuple:
        items = get_args(inner)
        if items[-1] is Ellipsis:
            return f"a list, each item {_describe(items[0])}"
        return f"a list of {len(items)}: " + ", ".join(_describe(item) for item in items)
    return words.get(inner, str(inner))


def _suggest(key: str, known: list[str]) -> str:
    close = get_close_matches(key, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f", expected one of {', '.join(known)}"


# --- writing ---------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Plain JSON readers let the last of two equal keys win; in a hand-edited file that hides a mistake."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} appears twice in one object")
        result[key] = value
    return result
