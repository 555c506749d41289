"""Names with settings, as users write them: ``"vmi"``, ``"vmi:steps=200,rate=0.1"``.

Attacks and defences are chosen so.  A setting is a keyword-only argument with a default, and takes values of its kind.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar

from vflair_flower.errors import ConfigurationError

Setting = bool | int | float | str
_T = TypeVar("_T")


class Registry(Generic[_T]):
    """What is chosen by name, of one sort: a package's own, which are read when one is first asked for, and others'.

    Parameters
    ----------
    sort : str
        Such as ``"attack"``, for errors.
    *packages : str
        Packages whose modules register the package's own.
    """

    def __init__(self, sort: str, *packages: str) -> None:
        self.by_name: dict[str, _T] = {}
        self._sort = sort
        self._packages = packages
        self._modules: dict[str, str] = {}

    def add(self, name: str, one: _T, settings: Mapping[str, Setting], *, module: str) -> None:
        """Register one under a name; a module may register its own again, as it does when it is read twice.

        Raises
        ------
        ConfigurationError
            Another module has registered this name, or a setting has no default.
        """
        before = self._modules.get(name, module)
        if name in self.by_name and before != module:
            raise ConfigurationError(f"two {self._sort}s are called {name!r}, in {before} and {module}. Rename one.")
        check_defaults(settings, of=f"{self._sort} {name!r}")
        self.by_name[name] = one
        self._modules[name] = module

    def all(self) -> Mapping[str, _T]:
        """Return all by name, sorted."""
        for package in self._packages:
            for module in iter_modules(import_module(package).__path__, f"{package}."):
                import_module(module.name)
        self._packages = ()
        return dict(sorted(self.by_name.items()))

    def find(self, name: str) -> _T:
        """Return one by name; raise ConfigurationError for an unknown one."""
        known = self.all()
        if name not in known:
            raise ConfigurationError(f"the {self._sort} is {name!r}; known are {', '.join(known)}.")
        return known[name]


def settings_of(function: Callable[..., object], *, besides: Collection[str] = ()) -> Mapping[str, Setting]:
    """Return the keyword-only arguments of a function and their defaults.

    Parameters
    ----------
    function : callable
        A function or a class.
    besides : collection of str
        Arguments that are no settings.
    """
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in besides
    }


def check_defaults(known: Mapping[str, Setting], *, of: str) -> None:
    """Raise ConfigurationError for a setting whose default is no plain value."""
    bare = [key for key, default in known.items() if not isinstance(default, Setting)]
    if bare:
        raise ConfigurationError(f"the setting {bare[0]!r} of {of} has no default of a plain kind. Give it one.")


def read_name(text: str) -> str:
    """Return the name that stands before the settings."""
    return text.partition(":")[0].strip()


def read_settings(text: str, known: Mapping[str, Setting], *, of: str) -> dict[str, Setting]:
    """Return the settings that stand behind a name.

    Parameters
    ----------
    text : str
        The name, and perhaps settings.
    known : mapping of str to value
        All settings and their defaults.
    of : str
        Whose they are, for errors.

    Raises
    ------
    ConfigurationError
        A setting is unknown, has no value, or one of another kind.
    """
    found: dict[str, Setting] = {}
    for part in filter(None, (piece.strip() for piece in text.partition(":")[2].split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigurationError(f"the setting {part!r} of {of} has no value. Write name=value.")
        found[key.strip()] = _read(value.strip(), known.get(key.strip()))
    check_settings(found, known, of=of)
    return found


def check_settings(given: Mapping[str, Any], known: Mapping[str, Setting], *, of: str) -> None:
    """Raise ConfigurationError for a setting that is unknown or of another kind than its default."""
    for name, value in given.items():
        if name not in known:
            raise ConfigurationError(f"{of} has no setting {name!r}; it has {', '.join(known) or 'none'}.")
        default = known[name]
        fits = isinstance(value, type(default)) or (isinstance(default, float) and type(value) is int)
        if not fits or isinstance(value, bool) is not isinstance(default, bool):
            raise ConfigurationError(
                f"setting {name!r} of {of} is {value!r}; give a {type(default).__name__}, such as {default!r}."
            )


def _read(text: str, like: Setting | None) -> Setting:
    if isinstance(like, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    for kind in (int, float):
        if isinstance(like, int | float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text
