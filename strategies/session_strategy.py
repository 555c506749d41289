"""What Flower strategies of this package have in common: a hub, a session per round, checkpoints, what was seen.

A round is one Flower message per data party, which opens a session at the hub; the round's tensors travel there.  A
wrapped strategy samples parties and aggregates the arrays that they send.  Not here: what the sessions are for.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from logging import INFO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor
from transformers import PreTrainedConfig

from vflair_flower.control import KEY, MODEL_PARTY_ROLE, SERVE, PartyCard, RoundReport
from vflair_flower.errors import ConfigurationError, PartyLostError
from vflair_flower.remote import MODEL_PARTY, SegmentServer
from vflair_flower.session import Ledger
from vflair_flower.settings import one_of
from vflair_flower.strategies.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vflair_flower.strategies.grid import SessionGrid
from vflair_flower.strategies.meeting import meet
from vflair_flower.strategies.secure import SecureRounds, refuse_aggregator
from vflair_flower.strategies.sessions import Outcome, RoundSession, SessionSettings


@dataclass(kw_only=True)
class RoundRecord:
    """What the strategy saw of one round; JSON values only."""

    server_round: int
    steps: int = 0
    tokens: int = 0
    sent_bytes: int = 0
    train_metrics: dict[str, float] = field(default_factory=dict)
    evaluate_metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


class SessionStrategy(Strategy):
    """A Flower strategy whose rounds are sessions at a hub.

    Parameters
    ----------
    sessions : SessionSettings
        What all sessions have in common.
    aggregator : flwr.serverapp.strategy.Strategy
        Samples parties and aggregates what they send; any Flower strategy.
    config : transformers.PreTrainedConfig
        The model's.
    body : SegmentServer or None
        Answers calls at the hub itself.
    needs_model_party : bool
        Whether one of the nodes is to be a model party.
    hello_deadline_s : float
        For all nodes to come and to say who they are, before anything is trained.
    checkpoint_dir : pathlib.Path or None
        Where to write a checkpoint after each round; None writes none.
    resume : bool
        Go on from the newest checkpoint in `checkpoint_dir`.
    """

    def __init__(
        self,
        *,
        sessions: SessionSettings,
        aggregator: Strategy,
        config: PreTrainedConfig,
        body: SegmentServer | None = None,
        needs_model_party: bool = False,
        hello_deadline_s: float = 300.0,
        checkpoint_dir: Path | None = None,
        resume: bool = False,
    ) -> None:
        one_of("on_party_lost", sessions.on_party_lost, ("continue", "stop"))
        if resume and checkpoint_dir is None:
            raise ConfigurationError("resume is set, but checkpoint_dir is not; name the folder of the checkpoints.")
        self.spec = sessions.spec
        self.aggregator = aggregator
        self.config = config
        """The model's configuration."""
        self.history: list[RoundRecord] = []
        self.ledger = Ledger()
        self.cards: dict[int, PartyCard] = {}
        self.reports: dict[str, RoundReport] = {}
        """The newest report of each party from a training session."""
        self.arrays: ArrayRecord = ArrayRecord()
        """The data parties' newest aggregated arrays."""
        self.control_bytes = 0
        self.control_messages = 0
        """What Flower messages carried, both ways: arrays and records."""
        self._sessions = sessions
        self._hub = sessions.hub.build()
        self._body = body
        self._needs_model_party = needs_model_party
        self._hello_deadline_s = hello_deadline_s
        self._checkpoint_dir = checkpoint_dir
        self._resume = resume
        self._shared_body_state: dict[str, Tensor] | None = None
        self._open: RoundSession | None = None
        self._first_round = 0
        self._secure: SecureRounds | None = None
        if self.spec.secure_aggregation is not None:
            refuse_aggregator(aggregator)
            self._secure = SecureRounds(self.spec, job=sessions.job, deadline_s=sessions.deadline_s, count=self._count)

    # ---- life ----

    def __enter__(self) -> Self:
        self._hub.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hub.close()
        if self._open is not None:
            self._open.end_recordings()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the job, as `Strategy.start` does.

        Parameters
        ----------
        grid : flwr.serverapp.Grid
            Flower's.
        initial_arrays : flwr.app.ArrayRecord, optional
            What data parties start from; by default one of them draws it from the job's seed.
        num_rounds : int, optional
            The job's rounds in all, those before a resume included; by default those of the specification.
        timeout, train_config, evaluate_config, evaluate_fn
            As in `Strategy.start`.

        Raises
        ------
        ConfigurationError
            Before any training, if parties' data, models or versions do not fit the job.
        PartyLostError
            If a party was lost and `on_party_lost` is ``"stop"``.
        SessionError
            If a round ended with no party left.
        """
        self._hub.start()
        watching = self._watch(grid)
        self._meet(watching, initial_arrays)
        rounds = self.spec.training.rounds if num_rounds is None else num_rounds
        return super().start(
            watching,
            self.arrays,
            rounds - self._first_round,
            timeout,
            train_config,
            evaluate_config,
            evaluate_fn,
        )

    def evaluate(
        self, grid: Grid, *, config: ConfigRecord | None = None, timeout: float = 3600
    ) -> tuple[MetricRecord | None, list[RoundReport]]:
        """Evaluate once more with the newest arrays, on what `config` says; returns metrics and parties' reports.

        Parameters
        ----------
        grid : flwr.serverapp.Grid
            Flower's.
        config : flwr.app.ConfigRecord, optional
            For `DataParty`: ``split`` (``"test"``) and ``report-rows`` (whether rows' ids and correctness come back).
        timeout : float
            Seconds.
        """
        watching = self._watch(grid)
        server_round = self._newest_round
        messages = self._configure("evaluate", server_round, self.arrays, config or ConfigRecord(), watching)
        outcome = self._close(watching.send_and_receive(messages, timeout=timeout))
        return self.aggregator.aggregate_evaluate(server_round, outcome.replies), outcome.reports

    # ---- Flower's hooks ----

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the aggregator sample data parties, open their session and put the way into it into each message."""
        server_round += self._first_round
        self.history.append(RoundRecord(server_round=server_round))
        return self._configure("train", server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Close the session and let the aggregator aggregate the heads and tails that came back."""
        server_round += self._first_round
        record = self.history[-1]
        outcome = self._close(replies)
        self.reports.update({report.party: report for report in outcome.reports})
        record.lost.update(outcome.lost)
        record.sent_bytes, record.tokens, record.steps = outcome.sent_bytes, outcome.tokens, outcome.steps
        record.seconds["train"] = outcome.seconds
        started = time.monotonic()
        replies = outcome.replies
        if self._secure is not None:
            replies = [self._secure.reveal(replies, self._names(), record.lost)]
        arrays, metrics = self.aggregator.aggregate_train(server_round, replies)
        record.seconds["aggregate"] = time.monotonic() - started
        record.train_metrics = _numbers(metrics)
        if arrays is not None:
            self.arrays = arrays
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As `configure_train`, for a session in which nothing is trained."""
        return self._configure("evaluate", server_round + self._first_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Close the session, let the aggregator average the metrics, and write the round's checkpoint."""
        server_round += self._first_round
        record = self.history[-1]
        metrics = None
        if self._open is not None:
            outcome = self._close(replies)
            record.lost.update(outcome.lost)
            record.sent_bytes += outcome.sent_bytes
            record.seconds["evaluate"] = outcome.seconds
            metrics = self.aggregator.aggregate_evaluate(server_round, outcome.replies)
            record.evaluate_metrics = _numbers(metrics)
        self._save(server_round)
        return metrics

    # ---- sessions ----

    def _configure(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        ask = self.aggregator.configure_train if kind == "train" else self.aggregator.configure_evaluate
        asked = list(ask(server_round, arrays, config, grid))
        if kind == "train" and self._secure is not None and asked:
            asked = self._agree(self._secure, asked, server_round, grid)
        return self._invite(asked, server_round, training=kind == "train")[1] if asked else []

    def _agree(self, secure: SecureRounds, asked: list[Message], server_round: int, grid: Grid) -> list[Message]:
        """Let the sampled parties share masks, before the session's clock runs."""
        asked, lost = secure.agree(asked, self._names(), server_round, grid)
        self.history[-1].lost.update(lost)
        if lost and self._sessions.on_party_lost == "stop":
            first = min(lost)
            raise PartyLostError(first, f"{lost[first]} (round {server_round}; lost in all: {', '.join(sorted(lost))})")
        return asked

    def _invite(self, asked: list[Message], server_round: int, *, training: bool) -> tuple[RoundSession, list[Message]]:
        """Open a session, and put the way into it into each message; adds the model party's, if a node is it."""
        nodes = {m.metadata.dst_node_id: self._card(m.metadata.dst_node_id).party for m in asked}
        model_node = self._model_node()
        if model_node is not None:
            nodes[model_node] = MODEL_PARTY
        self._open = opened = RoundSession(
            settings=self._sessions,
            hub=self._hub,
            body=self._body,
            nodes=nodes,
            server_round=server_round,
            training=training,
        )
        messages = []
        for message in asked:
            node = message.metadata.dst_node_id
            content = RecordDict({**message.content, KEY: opened.offer(node).to_record()})
            messages.append(Message(content, dst_node_id=node, message_type=message.metadata.message_type))
        if model_node is not None:
            content = RecordDict({KEY: opened.offer(model_node).to_record()})
            messages.append(Message(content, dst_node_id=model_node, message_type=f"train.{SERVE}"))
        for message in messages:
            self._count(message)
        return opened, messages

    @property
    def _newest_round(self) -> int:
        return self.history[-1].server_round if self.history else self._first_round

    def _close(self, replies: Iterable[Message]) -> Outcome:
        opened, self._open = self._open, None
        if opened is None:
            raise ConfigurationError("there is nothing to aggregate: the wrapped aggregator sampled no data party.")
        outcome = opened.close(list(replies))
        self.ledger.merge(opened.session.ledger)
        if outcome.body_state is not None:
            self._shared_body_state = outcome.body_state
        return outcome

    def _count(self, message: Message) -> None:
        self.control_messages += 1
        if message.has_content():
            self.control_bytes += sum(record.count_bytes() for record in message.content.values())

    # ---- parties ----

    def _meet(self, watching: SessionGrid, initial_arrays: ArrayRecord | None) -> None:
        """Ask all nodes who they are, and begin with given, drawn or saved arrays."""
        checkpoint = None
        if self._resume:
            assert self._checkpoint_dir is not None
            checkpoint = load_checkpoint(self._checkpoint_dir, spec=self.spec.to_json())
        self.cards, drawn = meet(
            watching.inner,
            self.spec,
            want_arrays=initial_arrays is None and checkpoint is None,
            body_here=not self._needs_model_party,
            timeout_s=self._hello_deadline_s,
        )
        self.arrays = drawn if initial_arrays is None else initial_arrays
        if checkpoint is not None:
            self._restore(checkpoint)

    def _watch(self, grid: Grid) -> SessionGrid:
        return SessionGrid(
            grid.inner if isinstance(grid, SessionGrid) else grid,
            data_nodes=self._data_nodes,
            may_still_come=lambda missing: self._open is None or self._open.may_still_come(missing),
            on_reply=self._on_reply,
        )

    def _on_reply(self, reply: Message) -> None:
        self._count(reply)
        if self._open is not None:
            self._open.on_reply(reply)

    def _data_nodes(self) -> list[int] | None:
        if not self.cards:
            return None
        return [node for node, card in self.cards.items() if card.role != MODEL_PARTY_ROLE]

    def _model_node(self) -> int | None:
        if not self._needs_model_party:
            return None
        return next(node for node, card in self.cards.items() if card.role == MODEL_PARTY_ROLE)

    def _names(self) -> dict[int, str]:
        return {node: card.party for node, card in self.cards.items()}

    def _card(self, node: int) -> PartyCard:
        if node not in self.cards:
            raise ConfigurationError(
                f"node {node} joined after the job began and is not known to it. Start the job when all parties are on."
            )
        return self.cards[node]

    # ---- checkpoints ----

    def _save(self, server_round: int) -> None:
        if self._checkpoint_dir is None:
            return
        started = time.monotonic()
        save_checkpoint(
            self._checkpoint_dir,
            Checkpoint(
                server_round=server_round,
                spec=self.spec.to_json(),
                arrays=dict(self.arrays.to_torch_state_dict()),
                body=None if self._body is None else dict(self._body.state()),
                history=[asdict(record) for record in self.history],
                ledger=self.ledger.to_json(),
                reports={name: asdict(report) for name, report in self.reports.items()},
            ),
        )
        self.history[-1].seconds["checkpoint"] = time.monotonic() - started

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.arrays = ArrayRecord(checkpoint.arrays)
        if self._body is not None and checkpoint.body is not None:
            self._body.load_state(checkpoint.body)
        self.history = [RoundRecord(**record) for record in checkpoint.history]
        self.ledger = Ledger.from_json(checkpoint.ledger)
        self.reports = {name: RoundReport(**report) for name, report in checkpoint.reports.items()}
        self._first_round = checkpoint.server_round
        log(INFO, "resuming after round %d", checkpoint.server_round)


def _numbers(metrics: MetricRecord | None) -> dict[str, float]:
    values: dict[str, Any] = dict(metrics or {})
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
