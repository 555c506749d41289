"""What travels in Flower messages beside the aggregator's own records: who is who, and the way into a session.

One `ConfigRecord` under the key ``"vflair"`` of every message and reply; nothing of it is a tensor.  The strategy
writes `SessionOffer`, parties write `PartyCard` and `RoundReport`.
"""

import importlib.metadata
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from flwr.app import ConfigRecord, RecordDict

from vflair_flower.errors import ConfigurationError

DATA_PARTY_ROLE, MODEL_PARTY_ROLE = "data party", "model party"

KEY = "vflair"
HELLO = "vflair"
"""Name of the query in which parties say who they are: message type ``query.vflair``."""
SERVE = "vflair_model_party"
"""Name of the train message that asks a model party to serve: message type ``train.vflair_model_party``."""
GENERATE = "vflair_generate"
"""Name of the query that asks data parties to write texts: message type ``query.vflair_generate``."""

AUDIT = "vflair_audit"
"""Name of the query that asks a node to run a cell of an audit: message type ``query.vflair_audit``."""

HAND_OVER = "vflair_hand_over"
"""Name of the query that asks parties for their parts of a finished model: message type ``query.vflair_hand_over``."""

SECAGG = "vflair_secagg"
"""Name of the query of secure aggregation's stages, ``query.vflair_secagg``; key of its records in train messages."""


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A frozen record of JSON values that travels in a `ConfigRecord`."""

    def to_record(self) -> ConfigRecord:
        """Return it for a message."""
        return ConfigRecord({"json": json.dumps(asdict(self))})

    @classmethod
    def from_content(cls, content: RecordDict, key: str = KEY) -> Self:
        """Read it from a message's content; raise ConfigurationError if it is not there or does not fit."""
        try:
            values: dict[str, Any] = json.loads(str(content.config_records[key]["json"]))
            known = {f.name for f in fields(cls)}
            if set(values) != known:
                raise ConfigurationError(f"fields {sorted(set(values) ^ known)} are missing or unknown")
            return cls(**values)
        except (KeyError, ValueError) as error:
            raise ConfigurationError(
                f"the Flower message carries no readable '{key}' record of the kind {cls.__name__}: {error}. "
                "It was not sent by vflair_flower's strategy, or by another version of it."
            ) from error


@dataclass(frozen=True, kw_only=True)
class SessionOffer(_Record):
    """The strategy's invitation of one party into one session.

    Parameters
    ----------
    spec, agreement : str
        JSON of `SplitSpec` and `Agreement`.
    job : str
        Name of the job; a resumed job keeps it, whatever Flower's run id.
    address, session, ticket : str
        Where the hub listens, the session there, and this party's one-time ticket.
    party : str
        The party's name in the job.
    parties : list[str]
        All data parties of the session.
    server_round : int
        From 1.
    training : bool
        Whether the session trains.
    deadline_s : float
        For every call, in seconds.
    body_mode : str
        How the body is updated; for the model party.
    root_certificates : str
        PEM text of who signed the hub's certificate; empty for a hub without TLS.
    allow_plaintext : bool
        Whether the strategy was told to accept an unencrypted hub outside loopback.
    """

    spec: str
    agreement: str
    job: str
    address: str
    session: str
    ticket: str
    party: str
    parties: list[str]
    server_round: int
    training: bool
    deadline_s: float
    body_mode: str
    root_certificates: str
    allow_plaintext: bool


@dataclass(frozen=True, kw_only=True)
class PartRequest(_Record):
    """The strategy's wish for a part of a finished model, or for a party's word that it would hand it over.

    Parameters
    ----------
    spec, job, party, parties
        As in `SessionOffer`.
    server_round : int
        Of the newest training.
    part : str
        ``"experts"`` or ``"backbone"``.
    layer : int
        Of the experts: place among the layers with experts.
    only_ask : bool
        Whether nothing is to be handed over yet.
    """

    spec: str
    job: str
    party: str
    parties: list[str]
    server_round: int
    part: str
    layer: int
    only_ask: bool


@dataclass(frozen=True, kw_only=True)
class SumStage(_Record):
    """A stage of secure aggregation, as the strategy asks for it (`vflair_flower.privacy.masked_party`).

    Parameters
    ----------
    spec, job, party, server_round
        As in `SessionOffer`; the specification comes with the first stage alone.
    stage : str
        ``"keys"``, ``"share"``, ``"mask"`` or ``"unmask"``.
    parties : int
        How many share masks in this round.
    payload : dict
        What the stage needs of others; by party.
    """

    spec: str
    job: str
    party: str
    server_round: int
    stage: str
    parties: int = 0
    payload: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SumAnswer(_Record):
    """A party's answer to a stage; in a train reply it goes with the masked vector.

    Parameters
    ----------
    payload : dict
        By party, or of the vector: its layout, and the check of its seed.
    """

    payload: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PartyCard(_Record):
    """A party's answer to the strategy's hello.

    Parameters
    ----------
    party : str
        Its name.
    role : str
        ``"data party"`` or ``"model party"``.
    rows : dict[str, int]
        Rows by split; empty for a model party.
    versions : dict[str, str]
        Of the packages that must fit together.
    """

    party: str
    role: str
    rows: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RoundReport(_Record):
    """What a party measured in one session.

    Parameters
    ----------
    party, role : str
        Who.
    steps, tokens : int
        Optimiser steps taken; tokens that went through the model, padding not counted.
    seconds : float
        From opening the session to leaving it.
    parameters_held, parameters_trained : int
        Numbers of parameters.
    memory : dict[str, int]
        Peak bytes by part (`vflair_flower.memory.MemoryParts`).
    process_peak_bytes : int
        Most resident memory of the party's whole process.
    scores : list[float]
        For each evaluated row its figure in 0..1, if the strategy asked for it; else empty.
    row_ids : list[str]
        Which rows those are; else empty.
    privacy : dict[str, float]
        Under DP-SGD what training has cost so far: epsilon, delta and what they follow from; else empty.
    """

    party: str
    role: str
    steps: int
    tokens: int
    seconds: float
    parameters_held: int
    parameters_trained: int
    memory: dict[str, int]
    process_peak_bytes: int
    scores: list[float] = field(default_factory=list)
    row_ids: list[str] = field(default_factory=list)
    privacy: dict[str, float] = field(default_factory=dict)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages on which all parties' arithmetic and messages depend."""
    names = ("vflair-flower", "torch", "transformers", "peft", "flwr")
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # the app runs from the copy that its bundle carries
