"""What installs: every package is listed, nothing generic is, and public names are there."""

import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    linked = {"vflair_flower.strategies", "vflair_flower.clients"}
    folders = (path.parent for path in (ROOT / "vflair_flower").rglob("__init__.py"))
    found = linked | {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found
    assert found >= {"vflair_flower.strategies", "vflair_flower.clients"}


def test_nothing_imports_the_folders_at_the_root_by_their_short_names():
    """In an app bundle the root is on sys.path, and a short name would load a second copy of every class."""
    files = [
        p for folder in ("vflair_flower", "strategies", "clients", "simulations") for p in (ROOT / folder).rglob("*.py")
    ]
    short = re.compile(r"^\s*(from|import) (strategies|clients)\b", re.MULTILINE)
    assert len(files) > 50
    assert [str(path) for path in files if short.search(path.read_text())] == []


def test_lower_rooms_do_not_import_upper_ones():
    """`vflair_flower` knows no strategy, no client and no simulation; strategies and clients do not know each other."""
    for folder, forbidden in (
        ("vflair_flower", "vflair_flower.strategies|vflair_flower.clients|simulations"),
        ("strategies", "vflair_flower.clients|simulations"),
        ("clients", "vflair_flower.strategies|simulations"),
    ):
        wrong = re.compile(rf"^\s*(from|import) ({forbidden})\b", re.MULTILINE)
        files = {path.resolve() for path in (ROOT / folder).rglob("*.py")}
        paths = [path for path in files if path.relative_to(ROOT).parts[0] == folder]
        assert paths
        assert [str(path) for path in paths if wrong.search(path.read_text())] == []


@pytest.mark.parametrize(
    "name", ["clients", "partition", "remote", "report", "session", "strategies", "tasks", "training"]
)
def test_public_names_are_there_and_documented(name):
    module = importlib.import_module(f"vflair_flower.{name}")
    assert module.__all__ == sorted(module.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    for public in module.__all__:
        value = getattr(module, public)
        assert value.__doc__ or not (inspect.isclass(value) or inspect.isfunction(value)), public
