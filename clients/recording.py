"""What a party records of its own sessions: what it sees as an adversary and, at a data party, the truth behind it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from flwr.app import Context
from torch import nn

from vflair_flower.control import SessionOffer
from vflair_flower.errors import ConfigurationError
from vflair_flower.remote.truth import TruthRecorder
from vflair_flower.session import RecordingSettings, Tap
from vflair_flower.session.recording import joint_tap, recorders_at_party
from vflair_flower.tasks import Encoded

Record = RecordingSettings | Callable[[Context], RecordingSettings | None] | None
"""What a party's `record` may be; a callable gets the node's context."""


@dataclass(frozen=True, kw_only=True)
class PartyRecording:
    """An open recording; with neither tap nor truth where none was asked for."""

    tap: Tap | None = None
    truth: TruthRecorder | None = None

    def name_rows(self, encoded: Iterable[Encoded]) -> None:
        """Learn whose tokens are whose, for the truth."""
        if self.truth is not None:
            self.truth.name_rows(encoded)


def recording_of(record: Record, context: Context) -> RecordingSettings | None:
    """Return a node's settings."""
    return record(context) if callable(record) else record


@contextmanager
def party_recording(
    settings: RecordingSettings | None, offer: SessionOffer, model: nn.Module | None = None
) -> Iterator[PartyRecording]:
    """Record a session of a party, inside the block; the link must be closed in it.

    Parameters
    ----------
    settings : RecordingSettings or None
        None records nothing.
    offer : SessionOffer
        The session.
    model : torch.nn.Module, optional
        A data party's model, whose truth is written down; without, only what the party sees is.

    Raises
    ------
    ConfigurationError
        If a folder cannot be used, or nothing would be recorded.
    """
    if settings is None:
        yield PartyRecording()
        return
    job, party, server_round, training = offer.job, offer.party, offer.server_round, offer.training
    recorders = recorders_at_party(settings, job=job, party=party, server_round=server_round, training=training)
    if model is None and not recorders:
        raise ConfigurationError(
            f"party '{offer.party}' records {', '.join(settings.adversaries) or 'nobody'}, and sees what none of them "
            f"sees. Choose '{offer.party}' as model party, 'host:{offer.party}' or 'network', or record at the hub."
        )
    truth = None
    if model is not None:
        truth = TruthRecorder(settings, job=job, party=party, server_round=server_round, training=training)
    taps: list[Tap] = [*recorders, *([] if truth is None else [truth])]
    try:
        with nullcontext() if truth is None or model is None else truth.watching(model):
            yield PartyRecording(tap=joint_tap(taps), truth=truth)
    finally:
        for recorder in recorders:
            recorder.close()
        if truth is not None:
            truth.close()
