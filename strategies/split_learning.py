"""Split learning as a Flower strategy: wraps the aggregator that a team already uses.

    with SplitLearning(spec=spec, aggregator=FedAvg()) as strategy:
        result = strategy.start(grid, num_rounds=6)

A round is one Flower message per data party, which opens a session at the hub; the round's tensors travel there.  The
wrapped aggregator samples parties and aggregates what they train (heads and tails); the body is trained by the session,
held here or by a node of its own.  Not here: anybody's rows, and in Head-Body-Tail any label.
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
from safetensors.torch import save_file
from torch import Tensor

from vflair_flower.certificate import load_admitted_config
from vflair_flower.control import GENERATE, KEY, MODEL_PARTY_ROLE, SERVE, PartyCard, RoundReport
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import load_segment, refuse_trained_copies, resolve_model, save_merged_adapter
from vflair_flower.partition.footprint import footprint
from vflair_flower.partition.merging import SPEC_FILE, TRAINED_FILE
from vflair_flower.partition.structure import num_blocks
from vflair_flower.remote import MODEL_PARTY, BodyMode, SegmentServer, agreement_for
from vflair_flower.session import Ledger
from vflair_flower.settings import DecodingSettings, one_of
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vflair_flower.strategies.generation import GenerationCounts, check_generation, counts_of
from vflair_flower.strategies.grid import SessionGrid
from vflair_flower.strategies.hub_settings import HubSettings
from vflair_flower.strategies.meeting import meet
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
    hello_deadline_s : float
        For all nodes to come and to say who they are, before anything is trained.
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
        hello_deadline_s: float = 300.0,
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
        if spec.averaging == "step" and body_mode != BodyMode.SYNCHRONOUS:
            raise ConfigurationError(
                f"averaging is 'step' and body_mode is '{body_mode}': averaging waits for all parties at every step, "
                "and only 'synchronous' lets all of them step at once. Set averaging to 'round', or another body_mode."
            )
        if resume and checkpoint_dir is None:
            raise ConfigurationError("resume is set, but checkpoint_dir is not; name the folder of the checkpoints.")
        self.spec = spec
        self.aggregator = aggregator
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
        self._checkpoint_dir = checkpoint_dir
        self._resume = resume
        self._hello_deadline_s = hello_deadline_s
        source = resolve_model(spec.model, base_dir)
        self.config = load_admitted_config(source, spec.task)
        """The model's configuration."""
        segment = spec.plan.model_party(num_blocks(self.config))
        refuse_trained_copies(self.config, spec.plan, spec.task, spec.tuning)
        trained = footprint(source, spec).data_party.trained if spec.averaging == "step" else 0
        hub_settings = hub or HubSettings()
        self._hub = hub_settings.build()
        self._sessions = SessionSettings(
            spec=spec,
            agreement=agreement_for(spec, self.config, trained_parameters=trained),
            hub=hub_settings,
            body_mode=BodyMode(body_mode),
            job=job,
            deadline_s=deadline_s,
            join_deadline_s=join_deadline_s,
            on_party_lost=on_party_lost,
            progress_s=progress_s,
        )
        self._body: SegmentServer | None = None
        if model_party == "strategy":
            loaded = load_segment(source, segment, spec.task, weights=spec.weights, seed=spec.seed)
            self._body = SegmentServer(loaded, spec, body_mode=BodyMode(body_mode), deadline_s=deadline_s)
        self._shared_body_state: dict[str, Tensor] | None = None
        self._open: RoundSession | None = None
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
        holder = "the strategy" if self._body else "a node"
        log(INFO, "\t├──> Body: %s, held by %s", self._sessions.body_mode, holder)
        log(INFO, "\t├──> Hub: %s, deadline %g s", self._hub.address, self._sessions.deadline_s)
        log(INFO, "\t└──> Aggregator: %s", type(self.aggregator).__name__)
        self.aggregator.summary()

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

    def generate(
        self, grid: Grid, decoding: DecodingSettings | None = None, *, timeout: float = 3600
    ) -> list[GenerationCounts]:
        """Have every data party write texts for its own prompts with the newest arrays; prompts and texts stay there.

        Parameters
        ----------
        grid : flwr.serverapp.Grid
            Flower's.
        decoding : DecodingSettings, optional
            How; greedy by default.
        timeout : float
            Seconds.

        Returns
        -------
        list[GenerationCounts]
            By party; parties that were lost are missing, unless `on_party_lost` is ``"stop"``.

        Raises
        ------
        ConfigurationError
            If the job writes no texts, or not so many or so long ones.
        PartyLostError
            As in `start`.
        """
        decoding = decoding or DecodingSettings()
        check_generation(self.spec, decoding)
        self._hub.start()
        watching = self._watch(grid)
        if not self.cards:
            self._meet(watching, None)
        content = RecordDict({"arrays": self.arrays, "config": ConfigRecord({"decoding": decoding.to_json()})})
        asked = [
            Message(content, dst_node_id=node, message_type=f"query.{GENERATE}") for node in self._data_nodes() or ()
        ]
        opened, messages = self._invite(asked, self._newest_round, training=False)
        outcome = self._close(watching.send_and_receive(messages, timeout=timeout))
        return counts_of(outcome.replies, opened.nodes, opened.session.ledger)

    def body_state(self) -> dict[str, Tensor] | None:
        """Return the body's trained state by global name; None if a node holds it and does not share it."""
        return self._body.trained_state() if self._body else self._shared_body_state

    def save_adapter(self, folder: Path) -> bool:
        """Write what all segments trained into one folder; False if a node holds the body and does not share it.

        Under LoRA the folder is a PEFT adapter that plain `PeftModel.from_pretrained` loads on the full model; without,
        it holds the trained parameters in ``trained.safetensors``, by their names in the full model.  `merge_model`
        makes a whole model of either.
        """
        body = self.body_state()
        if body is None:
            return False
        data_parties = dict(self.arrays.to_torch_state_dict())
        if self.spec.tuning is not None:
            save_merged_adapter(folder, [data_parties, body], self.config, self.spec.tuning, self.spec.task)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.contiguous() for name, tensor in {**data_parties, **body}.items()}
            save_file(tensors, folder / TRAINED_FILE)
        (folder / SPEC_FILE).write_text(self.spec.to_json())
        return True

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
        arrays, metrics = self.aggregator.aggregate_train(server_round, outcome.replies)
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
        return self._invite(asked, server_round, training=kind == "train")[1] if asked else []

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
            body_here=self._body is not None,
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
        if self._body is not None:
            return None
        return next(node for node, card in self.cards.items() if card.role == MODEL_PARTY_ROLE)

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
