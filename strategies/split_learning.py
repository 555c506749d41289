"""Split learning as a Flower strategy: wraps the aggregator that a team already uses.

    with SplitLearning(spec=spec, aggregator=FedAvg()) as strategy:
        result = strategy.start(grid, num_rounds=6)

A round is one Flower message per data party, which opens a session at the hub; the round's tensors travel there.  The
wrapped aggregator samples parties and aggregates what they train (heads and tails); the body is trained by the session,
held here or by a node of its own.  Not here: anybody's rows, and in Head-Body-Tail any label.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from logging import INFO, WARNING
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from vflair_flower.control import (
    HELLO,
    KEY,
    MODEL_PARTY_ROLE,
    SERVE,
    PartyCard,
    RoundReport,
    SessionOffer,
    package_versions,
)
from vflair_flower.errors import ConfigurationError, PartyLostError, SessionError
from vflair_flower.memory import process_peak_bytes
from vflair_flower.partition import load_config, load_segment, resolve_model
from vflair_flower.partition.structure import num_blocks
from vflair_flower.remote import MODEL_PARTY, BodyMode, SegmentServer, agreement_for, parameter_counts
from vflair_flower.session import HubSession, Ledger
from vflair_flower.settings import one_of
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vflair_flower.strategies.grid import SessionGrid
from vflair_flower.strategies.hub_settings import HubSettings

_GRACE_S = 5.0


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


class SplitLearning(Strategy):
    """Train one model in segments.

    Parameters
    ----------
    spec : SplitSpec
        What all parties agree on.
    aggregator : flwr.serverapp.strategy.Strategy
        Samples data parties and aggregates their heads and tails; any Flower strategy.
    body_mode : BodyMode
        How the body is updated when several parties train it (`vflair_flower.remote.updates`).
    model_party : str
        ``"strategy"``: the body is held here; ``"node"``: by the one node whose role is model party.
    hub : HubSettings
        Where parties dial.
    deadline_s : float
        For every call between parties, in seconds.
    join_deadline_s : float
        A sampled party that has not dialled the hub by then is lost.
    on_party_lost : str
        ``"continue"``: the round goes on without it; ``"stop"``: the job ends with an error that names it.
    job : str
        Name of the job; names folders at the parties.
    checkpoint_dir : pathlib.Path or None
        Where to write a checkpoint after each round; None writes none.
    resume : bool
        Go on from the newest checkpoint in `checkpoint_dir`.
    base_dir : pathlib.Path or None
        What a relative model folder is relative to, here.
    progress_s : float
        Least seconds between two lines of progress.
    """

    def __init__(
        self,
        *,
        spec: SplitSpec,
        aggregator: Strategy,
        body_mode: BodyMode | str = BodyMode.SYNCHRONOUS,
        model_party: str = "strategy",
        hub: HubSettings | None = None,
        deadline_s: float = 120.0,
        join_deadline_s: float = 120.0,
        on_party_lost: str = "continue",
        job: str = "job",
        checkpoint_dir: Path | None = None,
        resume: bool = False,
        base_dir: Path | None = None,
        progress_s: float = 2.0,
    ) -> None:
        one_of("body_mode", str(body_mode), tuple(BodyMode))
        one_of("model_party", model_party, ("strategy", "node"))
        one_of("on_party_lost", on_party_lost, ("continue", "stop"))
        if resume and checkpoint_dir is None:
            raise ConfigurationError("resume is set, but checkpoint_dir is not; name the folder of the checkpoints.")
        self.spec = spec
        self.aggregator = aggregator
        self.body_mode = BodyMode(body_mode)
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
        self._hub_settings = hub or HubSettings()
        self._hub = self._hub_settings.build()
        self._deadline_s = deadline_s
        self._join_deadline_s = join_deadline_s
        self._on_party_lost = on_party_lost
        self._job = job
        self._checkpoint_dir = checkpoint_dir
        self._resume = resume
        self._progress_s = progress_s
        source = resolve_model(spec.model, base_dir)
        self.config = load_config(source, spec.task)
        blocks = num_blocks(self.config)
        self._trusted_pem = self._hub_settings.trusted_pem()
        self._agreement = agreement_for(spec, self.config)
        self._body: SegmentServer | None = None
        segment = spec.plan.model_party(blocks)
        if model_party == "strategy":
            loaded = load_segment(source, segment, spec.task, seed=spec.seed)
            self._body = SegmentServer(loaded, spec, body_mode=self.body_mode, deadline_s=deadline_s)
        self._body_state: dict[str, Tensor] | None = None
        self._open: _OpenSession | None = None
        self._first_round = 0

    # ---- life ----

    def __enter__(self) -> Self:
        self._hub.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hub.close()

    def summary(self) -> None:
        """Log the strategy's settings."""
        plan = self.spec.plan
        log(INFO, "\t├──> Partition: %s, %d head and %d tail blocks", plan.mode, plan.head_blocks, plan.tail_blocks)
        log(INFO, "\t├──> Body: %s, held by %s", self.body_mode, "the strategy" if self._body else "a node")
        log(INFO, "\t├──> Hub: %s, deadline %g s", self._hub.address, self._deadline_s)
        log(INFO, "\t└──> Aggregator: %s", type(self.aggregator).__name__)
        self.aggregator.summary()

    def start(  # type: ignore[override]
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
        checkpoint = None
        if self._resume:
            assert self._checkpoint_dir is not None
            checkpoint = load_checkpoint(self._checkpoint_dir, spec=self.spec.to_json())
        self._meet(watching, want_arrays=initial_arrays is None and checkpoint is None)
        if initial_arrays is not None:
            self.arrays = initial_arrays
        if checkpoint is not None:
            self._restore(checkpoint)
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
        server_round = self._first_round if not self.history else self.history[-1].server_round
        messages = self._configure("evaluate", server_round, self.arrays, config or ConfigRecord(), watching)
        replies = list(watching.send_and_receive(messages, timeout=timeout))
        kept, reports, _ = self._close(replies)
        return self.aggregator.aggregate_evaluate(server_round, kept), reports

    def body_state(self) -> dict[str, Tensor] | None:
        """Return the body's trained state by global name; None if a node holds it and does not share it."""
        return self._body.trained_state() if self._body else self._body_state

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
        opened = self._open
        kept, reports, lost = self._close(list(replies))
        self.reports.update({report.party: report for report in reports})
        record.lost.update(lost)
        if opened is not None:
            record.seconds["train"] = time.monotonic() - opened.started
            record.sent_bytes = opened.session.ledger.total()
        record.tokens = sum(r.tokens for r in reports if r.role != MODEL_PARTY_ROLE)
        record.steps = max((r.steps for r in reports if r.role != MODEL_PARTY_ROLE), default=0)
        started = time.monotonic()
        arrays, metrics = self.aggregator.aggregate_train(server_round, kept)
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
        opened = self._open
        metrics = None
        if opened is not None:
            kept, _, lost = self._close(list(replies))
            record.lost.update(lost)
            record.seconds["evaluate"] = time.monotonic() - opened.started
            record.sent_bytes += opened.session.ledger.total()
            metrics = self.aggregator.aggregate_evaluate(server_round, kept)
            record.evaluate_metrics = _numbers(metrics)
        self._save(server_round)
        return metrics

    # ---- sessions ----

    def _configure(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        ask = self.aggregator.configure_train if kind == "train" else self.aggregator.configure_evaluate
        asked = list(ask(server_round, arrays, config, grid))
        if not asked:
            return []
        names = {m.metadata.dst_node_id: self._card(m.metadata.dst_node_id).party for m in asked}
        self._open = opened = self._open_session(names, server_round, training=kind == "train")
        messages = []
        for message in asked:
            node = message.metadata.dst_node_id
            content = RecordDict({**message.content, KEY: opened.offer(names[node]).to_record()})
            messages.append(Message(content, dst_node_id=node, message_type=message.metadata.message_type))
        model_node = self._model_node()
        if model_node is not None:
            content = RecordDict({KEY: opened.offer(MODEL_PARTY).to_record()})
            messages.append(Message(content, dst_node_id=model_node, message_type=f"train.{SERVE}"))
            opened.nodes[model_node] = MODEL_PARTY
        for message in messages:
            self._count(message)
        return messages

    def _count(self, message: Message) -> None:
        self.control_messages += 1
        if message.has_content():
            self.control_bytes += sum(record.count_bytes() for record in message.content.values())

    def _open_session(self, names: dict[int, str], server_round: int, *, training: bool) -> "_OpenSession":
        parties = sorted(names.values())
        body = self._body
        if body is not None:
            body.begin(parties, server_round=server_round, training=training)
        session = self._hub.open_session(
            parties if body is not None else [*parties, MODEL_PARTY],
            self._agreement,
            hosts={} if body is None else {MODEL_PARTY: body},
            deadline_s=self._deadline_s,
            join_deadline_s=self._join_deadline_s,
            on_lost=self._lost,
        )

        def offer(party: str) -> SessionOffer:
            return SessionOffer(
                spec=self.spec.to_json(),
                agreement=self._agreement.to_json(),
                job=self._job,
                address=self._hub.address,
                session=session.id,
                ticket=session.tickets[party],
                party=party,
                parties=parties,
                server_round=server_round,
                training=training,
                deadline_s=self._deadline_s,
                body_mode=str(self.body_mode),
                root_certificates=self._trusted_pem,
                allow_plaintext=self._hub_settings.allow_plaintext,
            )

        return _OpenSession(session=session, nodes=dict(names), offer=offer, training=training)

    def _lost(self, party: str, reason: str) -> None:
        """Tell the body, so that nobody waits for the party; called by the hub."""
        if self._body is not None:
            self._body.leave(party, lost=True)
        opened = self._open
        if opened is None:
            return
        if party == MODEL_PARTY:
            opened.session.abort(f"the model party is lost: {reason}")
        elif self._on_party_lost == "stop":
            opened.session.abort(f"party '{party}' is lost: {reason}")

    def _close(self, replies: list[Message]) -> tuple[list[Message], list[RoundReport], dict[str, str]]:
        """Close the open session; returns the data parties' replies without our records, all reports, who was lost."""
        opened, self._open = self._open, None
        if opened is None:
            return replies, [], {}
        lost = {**opened.session.lost, **opened.failures}
        opened.session.close()
        self.ledger.merge(opened.session.ledger)
        if self._body is not None:
            self._body.end()
        kept, reports = [], []
        # By name, not as they came: a sum of floats depends on its order, and a job must be able to repeat itself.
        for reply in sorted(replies, key=lambda r: opened.nodes.get(r.metadata.src_node_id, "")):
            party = opened.nodes.get(reply.metadata.src_node_id, "")
            if reply.has_error():
                lost.setdefault(party, reply.error.reason)
                continue
            reports.append(RoundReport.from_content(reply.content))
            if party == MODEL_PARTY:
                if "body" in reply.content:
                    self._body_state = reply.content.array_records["body"].to_torch_state_dict()
            else:
                del reply.content[KEY]
                kept.append(reply)
        if self._body is not None and opened.training:
            reports.append(self._own_report(time.monotonic() - opened.started))
        for party, reason in sorted(lost.items()):
            log(WARNING, "party '%s' was lost: %s", party, reason)
        if lost and (self._on_party_lost == "stop" or not kept or MODEL_PARTY in lost):
            party = MODEL_PARTY if MODEL_PARTY in lost else opened.first_lost(lost)
            raise PartyLostError(party, f"{lost[party]}. Lost in this round: {', '.join(sorted(lost))}.")
        if not kept:
            raise SessionError(
                f"no data party answered in time; asked were {', '.join(sorted(opened.nodes.values()))}."
            )
        return kept, reports, lost

    def _own_report(self, seconds: float) -> RoundReport:
        assert self._body is not None
        held, trained = parameter_counts(self._body.module)
        counts = self._body.counts()
        return RoundReport(
            party=MODEL_PARTY,
            role=MODEL_PARTY_ROLE,
            steps=counts.steps,
            tokens=counts.tokens,
            seconds=seconds,
            parameters_held=held,
            parameters_trained=trained,
            memory=self._body.memory().to_json(),
            process_peak_bytes=process_peak_bytes(),
        )

    # ---- parties ----

    def _watch(self, grid: Grid) -> SessionGrid:
        return SessionGrid(
            grid.inner if isinstance(grid, SessionGrid) else grid,
            data_nodes=self._data_nodes,
            may_still_come=self._may_still_come,
            on_reply=self._on_reply,
        )

    def _data_nodes(self) -> list[int] | None:
        if not self.cards:
            return None
        return [node for node, card in self.cards.items() if card.role != MODEL_PARTY_ROLE]

    def _model_node(self) -> int | None:
        if self._body is not None:
            return None
        return next(node for node, card in self.cards.items() if card.role == MODEL_PARTY_ROLE)

    def _on_reply(self, reply: Message) -> None:
        """A party whose handler failed is lost to the session at once, not when somebody's deadline passes."""
        self._count(reply)
        opened = self._open
        if opened is None:
            return
        party = opened.nodes.get(reply.metadata.src_node_id)
        if party is None:
            return
        opened.answered.add(party)
        if reply.has_error():
            opened.failures[party] = reply.error.reason
            opened.session.expel(party, reply.error.reason)

    def _may_still_come(self, missing: set[int]) -> set[int]:
        opened = self._open
        if opened is None:
            return missing
        self._show_progress(opened)
        waiting = {opened.nodes[n] for n in missing if n in opened.nodes}
        gone = opened.session.lost
        still = {p for p in waiting if p not in gone}
        if still == {MODEL_PARTY} or not still:
            opened.session.close()  # everyone else is done: the model party's handler returns on this
        if gone and not still:
            # Their replies, Flower's word on what happened to them, may be on the way.
            opened.grace_until = opened.grace_until or time.monotonic() + _GRACE_S
            return missing if time.monotonic() < opened.grace_until else set()
        return missing

    def _show_progress(self, opened: "_OpenSession") -> None:
        now = time.monotonic()
        if not opened.training or now - opened.shown < self._progress_s or not opened.session.joined:
            return
        opened.shown = now
        ledger = opened.session.ledger
        served = self._body.counts() if self._body is not None else None
        seconds = max(now - opened.started, 1e-9)
        log(
            INFO,
            "\t    round %d/%d  %s  %.1f MB up, %.1f MB down, %.0f s",
            self.history[-1].server_round if self.history else 0,
            self.spec.training.rounds,
            f"body steps {served.steps}  {served.tokens / seconds:,.0f} tokens/s" if served else "",
            ledger.total("up") / 1e6,
            ledger.total("down") / 1e6,
            seconds,
        )

    def _card(self, node: int) -> PartyCard:
        if node not in self.cards:
            raise ConfigurationError(
                f"node {node} joined after the job began and is not known to it. Start the job when all parties are on."
            )
        return self.cards[node]

    def _meet(self, grid: SessionGrid, *, want_arrays: bool) -> None:
        """Ask every node who it is; check data, models and versions before anything is trained."""
        nodes = _wait_for_nodes(grid.inner)
        asked = [
            Message(
                RecordDict({"config": ConfigRecord({"spec": self.spec.to_json(), "want-arrays": want_arrays})}),
                dst_node_id=node,
                message_type=f"query.{HELLO}",
            )
            for node in nodes
        ]
        replies = list(grid.send_and_receive(asked, timeout=self._join_deadline_s))
        problems = [f"node {r.metadata.src_node_id}: {r.error.reason}" for r in replies if r.has_error()]
        silent = set(nodes) - {r.metadata.src_node_id for r in replies}
        problems += [f"node {node}: no answer within {self._join_deadline_s:g} s" for node in sorted(silent)]
        if problems:
            raise ConfigurationError("the job cannot start; " + " | ".join(problems))
        self.cards = {r.metadata.src_node_id: PartyCard.from_content(r.content) for r in replies}
        _check_cards(self.cards, hosted=self._body is not None)
        for reply in replies:
            if "arrays" in reply.content and not self.arrays:
                self.arrays = reply.content.array_records["arrays"]

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
                history=[vars(record) for record in self.history],
            ),
        )
        self.history[-1].seconds["checkpoint"] = time.monotonic() - started

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.arrays = ArrayRecord(checkpoint.arrays)  # type: ignore[arg-type]
        if self._body is not None and checkpoint.body is not None:
            self._body.load_state(checkpoint.body)
        self.history = [RoundRecord(**record) for record in checkpoint.history]
        self._first_round = checkpoint.server_round
        log(INFO, "resuming after round %d", checkpoint.server_round)


@dataclass
class _OpenSession:
    session: HubSession
    nodes: dict[int, str]
    offer: Callable[[str], SessionOffer]
    training: bool
    started: float = field(default_factory=time.monotonic)
    shown: float = 0.0
    grace_until: float = 0.0
    answered: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)

    def first_lost(self, lost: dict[str, str]) -> str:
        """The party that was lost first: what the others report is often only its consequence."""
        return next(iter(self.session.lost or lost))


def _wait_for_nodes(grid: Grid) -> list[int]:
    while not (nodes := sorted(grid.get_node_ids())):
        time.sleep(0.5)
    return nodes


def _check_cards(cards: dict[int, PartyCard], *, hosted: bool) -> None:
    names = [card.party for card in cards.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"several nodes are called {', '.join(map(repr, twice))}; give each node a name of its own "
            "(node_config party=...), and only one the role of model party."
        )
    model_parties = [card.party for card in cards.values() if card.role == MODEL_PARTY_ROLE]
    if len(model_parties) != (0 if hosted else 1) or len(model_parties) == len(cards):
        raise ConfigurationError(
            f"there are {len(model_parties)} nodes with the role of model party and {len(cards) - len(model_parties)} "
            f"data parties; this job needs {'none' if hosted else 'exactly one'} of the former and at least one of the "
            "latter. Set the nodes' role, or the strategy's model_party."
        )
    mine = package_versions()
    for card in cards.values():
        for package in ("transformers", "peft", "torch"):
            theirs = card.versions.get(package)
            if theirs != mine[package]:
                log(WARNING, "party '%s' has %s %s, the strategy has %s", card.party, package, theirs, mine[package])


def _numbers(metrics: MetricRecord | None) -> dict[str, float]:
    values: dict[str, Any] = dict(metrics or {})
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
