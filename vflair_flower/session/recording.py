"""Recordings: what a named adversary saw of real sessions, kept on disk for attacks to be tried on.

    SplitLearning(..., record=RecordingSettings(folder=Path("records"), adversaries=("model-party", "network")))
    view = split_view(read_recording(Path("records/job/recordings/model-party")), ...)

What it is: a `Tap` that keeps frames as they crossed, after all defences.  What it is not: on by default; and it knows
no text and no label, which crossed nowhere.  The format is docs/recording.md.
Invariants: a recording holds nothing that its adversary did not see; and whatever happens to it, the session goes on.
"""

import logging
import re
import secrets
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.session.calls import HUB
from vflair_flower.session.header import Kind
from vflair_flower.session.sampling import Sampler
from vflair_flower.session.sighting import Sighting, Tap
from vflair_flower.session.tensor_log import Line, TensorLog, read_log

logger = logging.getLogger(__name__)

RECORDING = "vflair-recording"
MODEL_PARTY, AGGREGATOR, NETWORK, HOST = "model-party", "aggregator", "network", "host:"
AGGREGATING = ("averager", "balancer")
"""The hub's endpoints that take sums over parties; who runs them is the aggregator."""
_NEARLY_FULL = 0.9
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ANSWERS = (Kind.REPLY, Kind.ERROR)


@dataclass(frozen=True, kw_only=True)
class RecordingSettings:
    """What is recorded and where.

    Parameters
    ----------
    folder : pathlib.Path
        Recordings at the hub go to ``<folder>/<job>/recordings/<adversary>/``, a party's own to
        ``<folder>/<job>/own/<party>/<adversary>/``, a data party's truth to ``<folder>/<job>/truth/<party>/``.
    adversaries : tuple of str
        Who records: ``"model-party"`` (calls to it and its replies), ``"aggregator"`` (the same of the endpoints that
        average and count), ``"host:NAME"`` (the same of one host of experts), ``"hub"`` (all that passes the hub, once)
        or ``"network"`` (sizes, times and directions on every line, and no content).
    every : int
        Each n-th forward pass of every caller is kept, with all that belongs to it: replies, the backward pass, or all
        frames of its cache.
    max_bytes : int
        The most that one adversary's folder, or one party's truth, may hold.

    Raises
    ------
    ConfigurationError
        If a value is out of range or an adversary unknown.
    """

    folder: Path
    adversaries: tuple[str, ...] = ()
    every: int = 1
    max_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if isinstance(self.adversaries, str):
            raise ConfigurationError(f"adversaries is the text {self.adversaries!r}; give a tuple of names.")
        for name in self.adversaries:
            known = name in (MODEL_PARTY, AGGREGATOR, HUB, NETWORK)
            if not known and not (name.startswith(HOST) and len(name) > len(HOST)):
                raise ConfigurationError(
                    f"the adversary to record is {name!r}; choose 'model-party', 'hub', 'aggregator', 'network' or "
                    "'host:' and the name of a party that hosts experts."
                )
        if len(set(self.adversaries)) != len(self.adversaries):
            raise ConfigurationError(f"the adversaries to record are {self.adversaries}; name each once.")
        for what, value, least in (("every", self.every, 1), ("max_bytes", self.max_bytes, 1 << 16)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"{what} is {value!r} in the settings of a recording; choose {least} or more.")

    def folder_of(self, job: str, adversary: str, *, party: str | None = None) -> Path:
        """Return the folder of an adversary's recording: the hub's, or a party's own."""
        where = Path("recordings") if party is None else Path("own") / folder_name(party)
        return self.folder / folder_name(job) / where / folder_name(adversary)


def folder_name(name: str) -> str:
    """Return a name as that of a folder; raise ConfigurationError if it cannot be one."""
    plain = re.sub(r"[:@]", "-", name)
    if not _NAME.fullmatch(plain):
        raise ConfigurationError(
            f"{name!r} cannot name a folder of a recording; use letters, digits, '.', '_' and '-'."
        )
    return plain


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded(Sighting):
    """A sighting that was kept; round and purpose of its session are the recorder's word, not the adversary's.

    Parameters
    ----------
    server_round : int
        Of the session.
    training : bool
        Whether the session trained.
    """

    server_round: int
    training: bool


class Recorder:
    """Keep what one adversary sees of one session; a `Tap`, safe for use from many threads.

    Parameters
    ----------
    settings : RecordingSettings
        Where, and how much.
    adversary : str
        One of the settings' adversaries.
    job : str
        Names the folder.
    streams : collection of str
        The parties that have a stream of their own in the session.
    server_round, training
        Of the session.
    party : str, optional
        Whose own recording it is; by default the hub's.

    Raises
    ------
    ConfigurationError
        If the folder cannot be used.
    """

    def __init__(
        self,
        settings: RecordingSettings,
        adversary: str,
        *,
        job: str,
        streams: Collection[str],
        server_round: int,
        training: bool,
        party: str | None = None,
    ) -> None:
        self.adversary = adversary
        self.folder = settings.folder_of(job, adversary, party=party)
        self._settings = settings
        self._streams = frozenset(streams)
        self._session = {"round": server_round, "training": training}
        self._sampler = Sampler(settings.every)
        self._lock = threading.Lock()
        self._why: str | None = None
        about = {"adversary": adversary, "every": settings.every}
        prefix = secrets.token_hex(6)
        self._log = TensorLog(self.folder, kind=RECORDING, about=about, prefix=prefix, max_bytes=settings.max_bytes)
        self._ended = self._log.noted or self._log.filling >= _NEARLY_FULL
        if self._ended:
            logger.warning("%s has ended or is full; nothing more is recorded there", self.folder)

    def __call__(self, seen: Sighting) -> None:
        """Keep a frame if the adversary sees it, and it is of the sample."""
        with self._lock:
            if self._ended:
                return
            try:
                if sees(self.adversary, seen, self._streams):
                    self._take(seen)
            except Exception as error:
                logger.exception("the recording %s failed, and goes no further", self.folder)
                self._end(f"the recording failed: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Write what waits; frames that come later are not kept."""
        with self._lock:
            if not self._ended:
                self._end(self._why)

    def _take(self, seen: Sighting) -> None:
        roomy = self._log.filling < _NEARLY_FULL
        if not roomy:
            self._fill()
        if not self._sampler.keeps(seen, may_begin=roomy):
            return
        if self.adversary == NETWORK:
            seen = _outside(seen)
        if not self._log.add({**_line(seen), **self._session}, seen.tensors):
            self._fill()
            self._end(self._why)

    def _fill(self) -> None:
        if self._why is None:
            self._why = (
                f"the recording has reached its cap of {self._settings.max_bytes} bytes; what came later is missing"
            )
            logger.warning("%s: %s", self.folder, self._why)

    def _end(self, why: str | None) -> None:
        self._ended = True
        try:
            self._log.close(why)
        except Exception:
            logger.exception("the end of the recording %s is lost", self.folder)


def recorders_at_hub(
    settings: RecordingSettings | None, *, job: str, parties: Sequence[str], server_round: int, training: bool
) -> tuple[Recorder, ...]:
    """Return a recorder for each adversary; none without settings."""
    if settings is None:
        return ()
    session = {"job": job, "streams": parties, "server_round": server_round, "training": training}
    return tuple(Recorder(settings, name, **session) for name in settings.adversaries)  # type: ignore[arg-type]


def recorders_at_party(
    settings: RecordingSettings | None, *, job: str, party: str, server_round: int, training: bool
) -> tuple[Recorder, ...]:
    """Return a recorder for each adversary that a party can be: itself as model party or host, or its own line."""
    if settings is None:
        return ()
    itself = {MODEL_PARTY} & {party} | {f"{HOST}{party}", NETWORK}
    return tuple(
        Recorder(
            settings,
            name,
            job=job,
            streams=(party,),
            server_round=server_round,
            training=training,
            party=party,
        )
        for name in settings.adversaries
        if name in itself
    )


def joint_tap(taps: Sequence[Tap]) -> Tap | None:
    """Return one tap for several; None for none, so that nothing is looked at."""
    if len(taps) < 2:
        return next(iter(taps), None)

    def look(seen: Sighting) -> None:
        for tap in taps:
            tap(seen)

    return look


def read_recording(folder: Path) -> Iterator[Recorded]:
    """Return what an adversary saw, in the order in which it did; tensors are read as they come.

    Parameters
    ----------
    folder : pathlib.Path
        With `index.jsonl`.

    Raises
    ------
    DataError
        At once, if the folder is no recording; later, if a part of it is broken or missing.
    """
    entries = read_log(folder, RECORDING)
    return (_recorded(line, tensors, folder) for line, tensors in entries)  # type: ignore[arg-type]


def sees(adversary: str, seen: Sighting, streams: Collection[str]) -> bool:
    """Return whether an adversary sees a frame of a session whose `streams` are these parties'."""
    if adversary == NETWORK:
        return True
    if adversary == HUB:  # what it passes on it sees on the stream of the party that asked
        passed_on = seen.kind is Kind.CALL and seen.direction == "down" and seen.source in streams
        answered = seen.kind in _ANSWERS and seen.direction == "up" and seen.target in streams
        return not passed_on and not answered
    if adversary == AGGREGATOR:
        return any(_answers(name, seen, streams) for name in AGGREGATING)
    if adversary == MODEL_PARTY and MODEL_PARTY not in streams and _of_hub(seen):
        return True
    return _answers(adversary.removeprefix(HOST), seen, streams)


def _answers(name: str, seen: Sighting, streams: Collection[str]) -> bool:
    """Whether a frame is a call to this party or endpoint of the hub, or its answer."""
    if name in streams:
        if seen.party != name:
            return False
        return (seen.kind is Kind.CALL and seen.direction == "down") or (
            seen.kind in _ANSWERS and seen.direction == "up"
        )
    if seen.direction == "up":
        return seen.kind is Kind.CALL and seen.target == name
    return seen.kind in _ANSWERS and seen.source == name


def _of_hub(seen: Sighting) -> bool:
    """Whether a frame is a call of the hub's own process, which only a body there makes, or an answer to it."""
    if seen.direction == "down":
        return seen.kind is Kind.CALL and seen.source == HUB
    return seen.kind in _ANSWERS and seen.target == HUB


def _outside(seen: Sighting) -> Sighting:
    """Return what is left of a frame for somebody outside of an encrypted line."""
    return replace(seen, call_id=0, source="", target="", operation="", meta={}, tensors={})


def _line(seen: Sighting) -> Line:
    return {
        "session": seen.session,
        "party": seen.party,
        "direction": seen.direction,
        "kind": seen.kind.name.lower(),
        "call": seen.call_id,
        "source": seen.source,
        "target": seen.target,
        "operation": seen.operation,
        "meta": dict(seen.meta),
        "bytes": seen.num_bytes,
        "time_s": seen.time_s,
    }


def _recorded(line: Line, tensors: dict[str, object], folder: Path) -> Recorded:
    try:
        direction: Literal["up", "down"] = {"up": "up", "down": "down"}[line["direction"]]  # type: ignore[assignment]
        return Recorded(
            session=str(line["session"]),
            party=str(line["party"]),
            direction=direction,
            kind=Kind[str(line["kind"]).upper()],
            call_id=int(line["call"]),
            source=str(line["source"]),
            target=str(line["target"]),
            operation=str(line["operation"]),
            meta=dict(line["meta"]),
            tensors=tensors,  # type: ignore[arg-type]
            num_bytes=int(line["bytes"]),
            time_s=float(line["time_s"]),
            server_round=int(line["round"]),
            training=bool(line["training"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"a line of {folder / 'index.jsonl'} is no frame ({type(error).__name__}: {error}): {str(line)[:120]}. It "
            "was changed, or written by another version."
        ) from error
