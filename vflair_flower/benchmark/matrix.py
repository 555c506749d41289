"""The matrix: settings x defences with their sweeps x seeds, as a TOML file; each cell is trained and then attacked.

    seeds = [0, 1, 2]
    attacks = "vmi:steps=40,choices=1 sip norm-scoring"
    audit-rows = 24

    [base]                      # keys of the main job's run configuration, for all cells
    data = "../shared/data/sst2"

    [[settings]]
    name = "sst2, Head-Body-Tail"
    mode = "HBT"

    [[defences]]
    name = "dp"
    sweep = ["dp:epsilon=1000", "dp:epsilon=100"]

    [anchors]                   # of the scores (`vflair_flower.benchmark.scores`)
    attack = "zero"

Every setting and seed is run without a defence too: that is MP*.
Invariant: a cell is plain text and numbers, so it travels in a message and names its line in a file.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from vflair_flower.audit import GridSettings
from vflair_flower.benchmark.scores import Anchors
from vflair_flower.errors import ConfigurationError
from vflair_flower.privacy import parse_defences
from vflair_flower.settings import as_type, read_toml

NONE = "none"
_STRICT = ConfigDict(extra="forbid", populate_by_name=True)
_OWN = {"defences", "defence-seed", "seed", "run-id", "runs", "base-dir", "audit", "resume", "job", "unsplit"}
"""Keys that the benchmark sets itself."""


@dataclass(frozen=True, kw_only=True, order=True)
class BenchCell:
    """One training run and the attacks on it.

    Parameters
    ----------
    setting : str
        Name of the setting.
    defence : str
        Name of the defence, or ``"none"``.
    defences : str
        What is applied, as the main job names it; empty for nothing.
    seed : int
        Of the run and of the attacks.
    """

    setting: str
    defence: str
    defences: str
    seed: int

    @property
    def name(self) -> str:
        """Unique in a matrix."""
        return f"{self.setting} / {self.defences or NONE} / {self.seed}"


@validated(frozen=True, kw_only=True, config=_STRICT)
class NamedDefence:
    """A defence and the settings that it is tried with, from weak to strong."""

    name: str
    sweep: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What is benchmarked.

    Parameters
    ----------
    name : str
        Of the file.
    seeds : tuple of int
        Of runs.
    attacks : str
        Names, perhaps with settings, with blanks between; an attack that does not fit a setting is left out of it.
    settings : mapping of str to mapping
        By name, the keys of the main job.
    defences : tuple of NamedDefence
        What is tried.
    audit_rows, auxiliary : int
        How many texts each attack gets, and how many the adversary has of its own.
    knowledge : str
        Of the blocks that the adversary does not hold.
    anchors : Anchors
        Of the scores.
    """

    name: str
    seeds: tuple[int, ...]
    attacks: str
    settings: Mapping[str, Mapping[str, Any]]
    defences: tuple[NamedDefence, ...]
    audit_rows: int = 24
    auxiliary: int = 400
    knowledge: str = "public"
    anchors: Anchors = field(default_factory=Anchors)

    def __post_init__(self) -> None:
        if not self.seeds or not self.settings:
            raise ConfigurationError(f"the matrix {self.name!r} needs seeds and [[settings]]; it has none.")
        _ = self.grid
        for one in self.defences:
            if one.name == NONE or not one.sweep:
                raise ConfigurationError(
                    f"the matrix {self.name!r} has the defence {one.name!r} with {len(one.sweep)} settings. Name it "
                    f"otherwise than {NONE!r}, which is always run, and give it one setting or more."
                )
            for text in one.sweep:
                parse_defences(text)

    @classmethod
    def read(cls, path: Path) -> "Matrix":
        """Read a matrix file; raise ConfigurationError for anything that is none."""
        read = as_type(_File, read_toml(path, "matrix"), path, "matrix")
        settings: dict[str, dict[str, Any]] = {}
        for one in read.settings:
            keys = {**read.base, **one}
            name = str(keys.pop("name", ""))
            odd = sorted(_OWN & set(keys))
            if not name or name in settings or odd:
                what = f"the key {odd[0]!r}, which the benchmark sets itself" if odd else f"the name {name!r}"
                raise ConfigurationError(
                    f"the matrix {str(path)!r} has a setting with {what}. Give each setting a name of its own, and "
                    "keys of the main job but "
                    f"{', '.join(sorted(_OWN))}."
                )
            settings[name] = keys
        return cls(
            name=path.stem,
            seeds=read.seeds,
            attacks=read.attacks,
            settings=settings,
            defences=read.defences,
            audit_rows=read.audit_rows,
            auxiliary=read.auxiliary,
            knowledge=read.knowledge,
            anchors=Anchors(**read.anchors),
        )

    @property
    def grid(self) -> GridSettings:
        """What every run is attacked with."""
        return GridSettings(attacks=self.attacks, knowledge=self.knowledge)

    @property
    def about(self) -> str:
        """What a cell's figures depend on beside the cell, as JSON text."""
        wanted = ("attacks", "settings", "audit_rows", "auxiliary", "knowledge")
        return json.dumps({name: getattr(self, name) for name in wanted}, sort_keys=True)

    @property
    def cells(self) -> list[BenchCell]:
        """All cells, those without a defence first."""
        tried = [(NONE, ""), *((one.name, text) for one in self.defences for text in one.sweep)]
        return [
            BenchCell(setting=setting, defence=name, defences=text, seed=seed)
            for (name, text), setting, seed in itertools.product(tried, self.settings, self.seeds)
        ]


@validated(frozen=True, kw_only=True, config=_STRICT)
class _File:
    seeds: tuple[int, ...]
    attacks: str
    settings: tuple[dict[str, Any], ...]
    defences: tuple[NamedDefence, ...] = ()
    base: dict[str, Any] = Field(default_factory=dict)
    audit_rows: int = Field(default=24, alias="audit-rows", ge=1)
    auxiliary: int = Field(default=400, ge=1)
    knowledge: str = "public"
    anchors: dict[str, Any] = Field(default_factory=dict)
