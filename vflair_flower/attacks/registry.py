"""The registry: an attack is one function in one file, with one decorator.

    @attack("nearest", goal=Goal.TEXT, sees=SplitView, paper="...")
    def nearest(view: SplitView, knows: Knowledge, *, seed: int = 0, steps: int = 100) -> TextGuess: ...

Keyword arguments behind `seed` are the attack's settings; they have defaults, and `run_attack` refuses unknown ones.
Invariant: an attack gets a view and what its adversary knows, and gives a guess; nobody tells it the truth.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from pkgutil import iter_modules
from typing import TypeVar

import psutil
import torch

from vflair_flower.attacks.guesses import Guess
from vflair_flower.attacks.knowledge import HeadKnowledge, Knowledge
from vflair_flower.errors import ConfigurationError
from vflair_flower.named import Registry, Setting, check_settings, read_name, read_settings, settings_of
from vflair_flower.partition import Mode
from vflair_flower.settings import TaskKind

AttackFunction = Callable[..., Guess]
_FunctionT = TypeVar("_FunctionT", bound=AttackFunction)
_SAMPLE_S = 0.05


class Goal(StrEnum):
    """What an attack is after."""

    TEXT = "text"
    LABELS = "labels"
    MEMBERS = "members"


class Phase(StrEnum):
    """What the victim must be doing for the attack to see enough."""

    INFERENCE = "inference"
    TRAINING = "training"
    GENERATION = "generation"


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A registered attack.

    Parameters
    ----------
    name : str
        Its name.
    goal : Goal
        What it is after.
    sees : type
        The kind of view that it takes.
    paper : str
        Where it is from, and where it differs.
    run : callable
        The function.
    during : Phase
        What the victim must be doing.
    modes, kinds, knowledge
        The cuts, the tasks and the knowledge of the model that it can be run with.
    causal_only : bool
        Whether it needs a model in which a token sees none behind it.
    """

    name: str
    goal: Goal
    sees: type
    paper: str
    run: AttackFunction
    during: Phase = Phase.INFERENCE
    modes: tuple[Mode, ...] = tuple(Mode)
    kinds: tuple[TaskKind, ...] = tuple(TaskKind)
    knowledge: tuple[HeadKnowledge, ...] = tuple(HeadKnowledge)
    causal_only: bool = False

    @property
    def settings(self) -> Mapping[str, Setting]:
        """Its settings and their defaults."""
        return settings_of(self.run, besides=("seed",))


@dataclass(frozen=True, kw_only=True, eq=False)
class Attempt:
    """One run of an attack.

    Parameters
    ----------
    guess : Guess
        What it came to.
    seconds : float
        Wall clock.
    memory_bytes : int
        How much larger the process, or on a GPU the memory in use, became at most.
    """

    guess: Guess
    seconds: float
    memory_bytes: int


_FOLDERS = [one.name for one in iter_modules([str(Path(__file__).parent)]) if one.ispkg]
_ATTACKS: Registry[Attack] = Registry("attack", *(f"vflair_flower.attacks.{folder}" for folder in _FOLDERS))


def attack(
    name: str,
    *,
    goal: Goal,
    sees: type,
    paper: str,
    during: Phase = Phase.INFERENCE,
    modes: Sequence[Mode] = tuple(Mode),
    kinds: Sequence[TaskKind] = tuple(TaskKind),
    knowledge: Sequence[HeadKnowledge] = tuple(HeadKnowledge),
    causal_only: bool = False,
) -> Callable[[_FunctionT], _FunctionT]:
    """Register an attack under a name.

    Parameters
    ----------
    name : str
        Small letters, digits and hyphens.
    goal : Goal
        What it is after, which decides the metrics.
    sees : type
        The kind of view that it takes, such as `SplitView`.
    paper : str
        Where it is from, and where it differs.
    during : Phase
        What the victim must be doing for the attack to see enough.
    modes, kinds, knowledge : sequences
        The cuts, the tasks and the knowledge of the model that it can be run with; all by default.
    causal_only : bool
        Whether it needs a model in which a token sees none behind it.

    Raises
    ------
    ConfigurationError
        Another attack has this name, or a setting has no default.
    """

    def register(function: _FunctionT) -> _FunctionT:
        made = Attack(
            name=name,
            goal=goal,
            sees=sees,
            paper=paper,
            run=function,
            during=during,
            modes=tuple(modes),
            kinds=tuple(kinds),
            knowledge=tuple(knowledge),
            causal_only=causal_only,
        )
        _ATTACKS.add(name, made, made.settings, module=function.__module__)
        return function

    return register


def attacks() -> Mapping[str, Attack]:
    """Return all attacks by name: those of this package and those that were loaded."""
    return _ATTACKS.all()


def load_attacks(file: Path) -> tuple[str, ...]:
    """Run a file of your own that registers attacks; returns their names.

    Raises
    ------
    ConfigurationError
        There is no such file, or it registers none.
    """
    import importlib.util

    if not file.is_file():
        raise ConfigurationError(f"the file of attacks {str(file)!r} does not exist. Name a Python file.")
    before = set(attacks())
    spec = importlib.util.spec_from_file_location(f"vflair_attacks_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    new = tuple(name for name, one in attacks().items() if name not in before or one.run.__module__ == module.__name__)
    if not new:
        raise ConfigurationError(f"{str(file)!r} registers no attack. Put @attack(...) above a function in it.")
    return new


def find_attack(name: str) -> Attack:
    """Return an attack by name; raise ConfigurationError for an unknown one."""
    return _ATTACKS.find(name)


def run_attack(
    which: Attack, view: object, knows: Knowledge, *, seed: int = 0, settings: Mapping[str, Setting] | None = None
) -> Attempt:
    """Run an attack on a view.

    Parameters
    ----------
    which : Attack
        See `find_attack`.
    view : object
        What the adversary saw, of the kind that the attack takes.
    knows : Knowledge
        What it knows beside.
    seed : int
        Of everything random in the attack.
    settings : mapping of str to value, optional
        By name, in place of the defaults.

    Raises
    ------
    ConfigurationError
        The view is of another kind, or a setting is unknown or of another kind than its default.
    """
    if not isinstance(view, which.sees):
        raise ConfigurationError(
            f"attack {which.name!r} takes a {which.sees.__name__}, and was given a {type(view).__name__}. Choose an "
            "attack on what this adversary sees."
        )
    given = dict(settings or {})
    check_settings(given, which.settings, of=_quoted(which))
    with torch.random.fork_rng(), _MemoryPeak() as memory:
        torch.manual_seed(seed)
        started = time.perf_counter()
        guess = which.run(view, knows, seed=seed, **given)
        seconds = time.perf_counter() - started
    return Attempt(guess=guess, seconds=seconds, memory_bytes=memory.peak_bytes)


def parse_settings(text: str) -> tuple[str, dict[str, Setting]]:
    """Read ``"vmi"`` or ``"vmi:steps=200,rate=0.1"``: an attack's name and settings of its kind.

    Raises
    ------
    ConfigurationError
        The attack or a setting is unknown, or a value is of another kind.
    """
    which = find_attack(read_name(text))
    return which.name, read_settings(text, which.settings, of=_quoted(which))


def _quoted(which: Attack) -> str:
    return f"attack {which.name!r}"


class _MemoryPeak:
    """Watch how far memory grows within a block: a GPU's where there is one, else that of the process."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._done = threading.Event()

    def __enter__(self) -> "_MemoryPeak":
        self._gpu = torch.cuda.is_available()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        process = psutil.Process()
        self._before = process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, args=(process,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu:
            self.peak_bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._done.set()
        self._thread.join()

    def _watch(self, process: psutil.Process) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss - self._before)
            if self._done.wait(_SAMPLE_S):
                return
