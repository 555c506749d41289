"""Frozen dataclasses to plain JSON values and back, strictly.

The type hints of a dataclass are its schema: there is no second description that could drift.  Known hints are
`str`, `int`, `float`, `bool`, `None`, `Literal`, unions of these, `tuple[X, ...]`, `Mapping[str, X]` and dataclasses.
Invariant: a field that is missing, unknown or of another type is refused by its full name, such as
`metric.split_interval.low`; nothing is guessed and nothing is dropped.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Literal, TypeVar, Union, cast, get_args, get_origin

from vflair_flower.errors import ConfigurationError

T = TypeVar("T")


def to_plain(value: object) -> object:
    """Return `value` as dicts, lists, strings and numbers that `json` can write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value


def from_plain(cls: type[T], value: object, *, where: str = "") -> T:
    """Build the dataclass `cls` from a plain mapping.

    Parameters
    ----------
    cls : type
        A dataclass whose hints are all of the kinds named in this module.
    value : object
        What `json.loads` returned.
    where : str
        Name of the field that holds `value`, for errors; empty at the top.

    Raises
    ------
    ConfigurationError
        A field is missing, unknown or of the wrong type, or the dataclass refuses its values.
    """
    if not isinstance(value, Mapping):
        raise ConfigurationError(
            f"{_named(where)} is {_shown(value)}, expected an object with the fields of {cls.__name__}."
        )
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cast("type[typing.Any]", cls))]
    for name in names:
        if name not in value:
            raise ConfigurationError(
                f"Field '{_join(where, name)}' is missing, so this is not a result of this version. "
                "Write it with the version of vflair_flower that reads it."
            )
    for name in value:
        if name not in names:
            raise ConfigurationError(
                f"Field '{_join(where, str(name))}' is unknown and would be lost. "
                "Read it with the version of vflair_flower that wrote it."
            )
    return cls(**{name: _convert(hints[name], value[name], _join(where, name)) for name in names})


def _convert(hint: object, value: object, where: str) -> object:
    """Check `value` against one type hint and return it in that type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigurationError(
            f"Field '{where}' is {_shown(value)}, expected one of {', '.join(map(repr, arguments))}."
        )
    if origin in (tuple, Mapping):
        return _convert_many(origin, arguments, value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where=where)
    if isinstance(value, bool) and hint is not bool:  # to Python a bool is an int, to a reader it is not
        raise _wrong_type(hint, value, where)
    if hint is float and isinstance(value, int):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise _wrong_type(hint, value, where)


def _wrong_type(hint: object, value: object, where: str) -> ConfigurationError:
    return ConfigurationError(f"Field '{where}' is {_shown(value)}, expected {getattr(hint, '__name__', hint)}.")


def _convert_many(origin: object, arguments: tuple[object, ...], value: object, where: str) -> object:
    """Check a list, or an object with free names, item by item."""
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigurationError(f"Field '{where}' is {_shown(value)}, expected a list.")
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"Field '{where}' is {_shown(value)}, expected an object.")
    return {str(key): _convert(arguments[1], item, _join(where, str(key))) for key, item in value.items()}


def _convert_union(hints: tuple[object, ...], value: object, where: str) -> object:
    if value is None and type(None) in hints:
        return None
    present = [hint for hint in hints if hint is not type(None)]
    exact = [hint for hint in present if hint is type(value)]
    candidates = exact or present
    for hint in candidates[:-1]:
        try:
            return _convert(hint, value, where)
        except ConfigurationError:
            continue
    return _convert(candidates[-1], value, where)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _named(where: str) -> str:
    return f"Field '{where}'" if where else "The whole"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
