"""The public names of `vflair_flower.tasks`, and that their examples run."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import vflair_flower.tasks as tasks


def test_exported_names_exist_are_sorted_and_documented() -> None:
    assert list(tasks.__all__) == sorted(tasks.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    exported = [getattr(tasks, name) for name in tasks.__all__]
    assert all(thing.__doc__ for thing in exported if inspect.isclass(thing) or inspect.isfunction(thing))


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(tasks.__path__)])
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"{tasks.__name__}.{name}")
    assert module.__doc__
    assert doctest.testmod(module).failed == 0
