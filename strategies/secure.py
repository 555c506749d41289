"""Secure aggregation from the strategy's side: Flower messages around a round's training, and one reply out of many.

Flower's `SecAggPlusWorkflow` drives whole rounds by Flower's older API, so it cannot carry sessions; this is the
same protocol around ours.  Before a round's session opens: keys, then sealed shares.  The train message takes what was
sealed for a party, its reply brings a masked vector, and after the session the parties unmask the sum.

The wrapped aggregator gets one reply: the weighted means, with the sum of the weights as its number of examples.
Invariant: nothing here ever holds one party's arrays.
"""

from collections.abc import Callable, Mapping
from logging import WARNING
from typing import Any

from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedMedian,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)

from vflair_flower.control import KEY, SECAGG, SumAnswer, SumStage
from vflair_flower.errors import ConfigurationError
from vflair_flower.privacy.masked_sum import MaskedSum
from vflair_flower.privacy.masks import Layout
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies.grid import reason_of

_WEIGHT = "num-examples"
_LOOK_AT_EACH = (
    Bulyan,
    FedMedian,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    Krum,
    MultiKrum,
    QFedAvg,
    DifferentialPrivacyServerSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyClientSideAdaptiveClipping,
)


class SecureRounds:
    """Sums of a job's rounds.

    Parameters
    ----------
    spec : SplitSpec
        With `secure_aggregation`.
    job : str
        Its name.
    deadline_s : float
        For every stage that has messages of its own.
    count : callable
        Told each message that is sent.
    """

    def __init__(self, spec: SplitSpec, *, job: str, deadline_s: float, count: Callable[[Message], None]) -> None:
        assert spec.secure_aggregation is not None
        self._settings = spec.secure_aggregation
        self._spec = spec.to_json()
        self._job = job
        self._deadline_s = deadline_s
        self._count = count
        self._grid: Grid | None = None
        self._nodes: dict[str, int] = {}
        self._sum: MaskedSum | None = None

    def agree(
        self, asked: list[Message], names: Mapping[int, str], server_round: int, grid: Grid
    ) -> tuple[list[Message], dict[str, str]]:
        """Let the sampled parties share masks.

        Parameters
        ----------
        asked : list of Message
            The aggregator's train messages.
        names : mapping
            Each node's party.
        server_round : int
            From 1.
        grid : Grid
            To send by.

        Returns
        -------
        messages, lost
            Those of the parties that can go on, each with what was sealed for it; who cannot, and why.

        Raises
        ------
        SessionError
            If too few are left.
        """
        self._grid, self._nodes = grid, {names[m.metadata.dst_node_id]: m.metadata.dst_node_id for m in asked}
        self._sum = summed = MaskedSum(self._settings, job=self._job, server_round=server_round, asked=self._nodes)
        summed.add_keys(self._ask("keys", {party: {} for party in self._nodes}))
        sealed = self._ask("share", {party: summed.keys_for(party) for party in sorted(summed.keys)})
        summed.add_sealed(sealed)
        messages = []
        for message in asked:
            party = names[message.metadata.dst_node_id]
            if party in summed.ready:
                record = self._stage("mask", party, summed.sealed_for(party)).to_record()
                content = RecordDict({**message.content, SECAGG: record})
                kind = message.metadata.message_type
                messages.append(Message(content, dst_node_id=message.metadata.dst_node_id, message_type=kind))
        return messages, dict(summed.lost)

    def reveal(self, replies: list[Message], names: Mapping[int, str], lost: Mapping[str, str]) -> Message:
        """Return one reply with the parties' means in place of theirs.

        Parameters
        ----------
        replies : list of Message
            What `masked` made of the parties' replies.
        names : mapping
            Each node's party.
        lost : mapping
            Who was lost in training, and why; for errors.

        Raises
        ------
        SessionError
            If too few replies came, or too few parties help to unmask; then nothing is unmasked.
        """
        summed, self._sum = self._sum, None
        if summed is None:
            raise ConfigurationError("there is no round to unmask; `configure_train` begins one.")
        summed.lost.update(lost)
        for reply in replies:
            party = names[reply.metadata.src_node_id]
            vector = reply.content.array_records.get("vector")
            if vector is None:
                raise ConfigurationError(
                    f"the reply of '{party}' is not masked. Register its train handler with mods=[masked] "
                    "(vflair_flower.clients.secure), and update that party."
                )
            about = SumAnswer.from_content(reply.content, SECAGG).payload
            summed.add_vector(
                party,
                vector["vector"].numpy(),
                layout=Layout.from_json(str(about["layout"])),
                seed_check=str(about["seed-check"]),
            )
        wishes = {party: {"summed": present, "lost": gone} for party, (present, gone) in summed.unmasking().items()}
        self._sum = summed
        for given in self._ask("unmask", wishes).values():
            summed.add_shares(given)
        self._sum = None
        arrays, metrics, weight = summed.total()
        content = RecordDict(
            {
                "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
                "metrics": MetricRecord({_WEIGHT: weight, **metrics}),
            }
        )
        return Message(content, dst_node_id=replies[0].metadata.src_node_id, message_type=MessageType.TRAIN)

    def _stage(self, stage: str, party: str, payload: Mapping[str, Any]) -> SumStage:
        assert self._sum is not None
        return SumStage(
            spec=self._spec if stage == "keys" else "",
            job=self._job,
            party=party,
            server_round=self._sum.server_round,
            stage=stage,
            parties=self._sum.parties,
            payload=dict(payload),
        )

    def _ask(self, stage: str, payloads: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Ask parties for a stage; those that fail or are silent are lost, and the sum says whether enough are left."""
        assert self._grid is not None
        assert self._sum is not None
        messages = [
            Message(
                RecordDict({KEY: self._stage(stage, party, payload).to_record()}),
                dst_node_id=self._nodes[party],
                message_type=f"{MessageType.QUERY}.{SECAGG}",
            )
            for party, payload in payloads.items()
        ]
        for message in messages:
            self._count(message)
        names = {node: party for party, node in self._nodes.items()}
        answers: dict[str, dict[str, Any]] = {}
        lost = dict.fromkeys(payloads, f"no answer to {stage!r} of secure aggregation within {self._deadline_s:g} s")
        for reply in self._grid.send_and_receive(messages, timeout=self._deadline_s):
            party = names[reply.metadata.src_node_id]
            if reply.has_error():
                lost[party] = reason_of(reply)
            else:
                del lost[party]
                answers[party] = SumAnswer.from_content(reply.content).payload
        for party, why in sorted(lost.items()):
            log(WARNING, "party '%s' is lost to the secure aggregation: %s", party, why)
        self._sum.lost.update(lost)
        return answers


def refuse_aggregator(aggregator: Strategy) -> None:
    """Raise ConfigurationError for an aggregator that must look at single parties' replies; there are none.

    Parameters
    ----------
    aggregator : Strategy
        What `SplitLearning` is to wrap; what that wraps in turn is looked at, too.
    """
    one: object | None = aggregator
    while one is not None:
        name = type(one).__name__
        if isinstance(one, _LOOK_AT_EACH):
            raise ConfigurationError(
                f"secure_aggregation is set, and {name} works on each party's own arrays or metrics, which nobody sees "
                "then. Use FedAvg or one of FedOpt's kind; clip at the parties (docs/secure-aggregation.md)."
            )
        if isinstance(one, DifferentialPrivacyClientSideFixedClipping) and one.accountant is not None:
            raise ConfigurationError(
                f"secure_aggregation is set, and {name}'s accountant checks that all parties weigh the same, which "
                "nobody sees then. Leave the accountant out, or secure_aggregation."
            )
        if getattr(one, "weighted_by_key", _WEIGHT) != _WEIGHT:
            raise ConfigurationError(
                f"secure_aggregation is set, and {name} weighs by {getattr(one, 'weighted_by_key', '')!r}; masked "
                f"arrays are weighed by {_WEIGHT!r} at the parties. Leave weighted_by_key as it is."
            )
        one = getattr(one, "strategy", None)
