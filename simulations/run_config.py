"""Read a job's settings from Flower's run configuration: one key per field, with the very type of the field."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from vflair_flower.errors import ConfigurationError

SettingsT = TypeVar("SettingsT")


def read_run_config(cls: type[SettingsT], config: Mapping[str, Any]) -> SettingsT:
    """Return the settings; raise ConfigurationError for a key that is missing or a value of the wrong kind.

    Parameters
    ----------
    cls : type
        A dataclass whose fields are named as the keys, with ``_`` for ``-``.
    config : mapping
        ``Context.run_config``.
    """
    values: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        key = field.name.replace("_", "-")
        if key not in config:
            raise ConfigurationError(f"the run configuration has no {key!r}; it is set in pyproject.toml.")
        value = config[key]
        wanted: Any = field.type
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not wanted:
            raise ConfigurationError(
                f"{key} is {value!r}; it takes a value of type {wanted.__name__}. "
                "In --run-config write text in quotes, numbers and true/false without."
            )
        values[field.name] = value
    return cls(**values)
