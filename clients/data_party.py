"""A data party, ready to use: says hello, trains and evaluates on its own rows.

    def my_rows(context: Context) -> PartyRows: ...

    app = ClientApp()
    DataParty(my_rows, state_dir=Path("state")).register(app)

B rows per batch, T tokens.  Text and (in Head-Body-Tail) labels never leave this process; what does is in the ledger.
Invariant: batches and dropout depend on seed, party and step alone, so a resumed job repeats itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from vflair_flower.clients.generation import TextGeneration, generate_texts
from vflair_flower.clients.naming import party_name
from vflair_flower.clients.recording import Record, recording_of
from vflair_flower.clients.secure import answer_stage, masked
from vflair_flower.clients.segment import load_data_segment
from vflair_flower.clients.session import PartySession, split_session
from vflair_flower.clients.store import PartyStore
from vflair_flower.control import (
    DATA_PARTY_ROLE,
    GENERATE,
    HELLO,
    KEY,
    SECAGG,
    PartyCard,
    SessionOffer,
    package_versions,
)
from vflair_flower.errors import DataError
from vflair_flower.partition import trained_state
from vflair_flower.privacy import Policy, Secret
from vflair_flower.privacy.learnt import SECRET
from vflair_flower.settings import TaskKind
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import BatchOrder, Encoded, Example, Row, encode_task
from vflair_flower.training import Evaluated, Trained, evaluate, metric_of, train_steps

ACCOUNT = "dp-sgd.json"


@dataclass(frozen=True, kw_only=True)
class PartyRows:
    """One party's own rows.

    Parameters
    ----------
    train, validation, test : tuple[Example, ...]
        Rows of the job's task (`vflair_flower.tasks.Example`); `test` may be empty.
    label_names : tuple[str, ...]
        What the labels mean, in order of their index; empty where there are none.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...] = ()
    label_names: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[Example, ...]:
        """Return the rows of a split; raise DataError for an unknown or empty one."""
        rows: dict[str, tuple[Example, ...]] = {"train": self.train, "validation": self.validation, "test": self.test}
        if not rows.get(name):
            have = ", ".join(n for n, r in rows.items() if r)
            raise DataError(f"this party has no rows in the split {name!r}; it has {have}.")
        return rows[name]


class DataParty:
    """The client side of split learning: classes, spans or texts (`vflair_flower.training.METRICS`).

    Parameters
    ----------
    rows : callable
        Returns this node's rows; called for every message, so cache what is slow.
    state_dir : pathlib.Path or callable
        Folder of this party's own, for optimiser state between rounds; a callable gets the context.
    base_dir : pathlib.Path or callable, optional
        What a relative model folder is relative to.
    threads : int
        CPU threads for torch; 0 leaves torch's own choice.
    generation : TextGeneration, optional
        This party's prompts, for `SplitLearning.generate`.
    record : RecordingSettings or callable, optional
        Where this party writes the truth behind its calls, for itself alone; a callable gets the context.  By default
        nothing is written (docs/recording.md).
    policy : Policy or callable, optional
        What may leave this party (docs/defences.md); a callable gets the context.  By default only the job's own
        defences are enforced.
    """

    def __init__(
        self,
        rows: Callable[[Context], PartyRows],
        *,
        state_dir: Path | Callable[[Context], Path],
        base_dir: Path | Callable[[Context], Path | None] | None = None,
        threads: int | Callable[[Context], int] = 0,
        generation: TextGeneration | None = None,
        record: Record = None,
        policy: Policy | Callable[[Context], Policy | None] | None = None,
    ) -> None:
        self._rows = rows
        self._policy = policy
        self._record = record
        self._generation = generation
        self._state_dir = state_dir
        self._base_dir = base_dir
        self._threads = threads

    def register(self, app: ClientApp, *, train: bool = True, evaluate: bool = True) -> None:
        """Register with a ClientApp; leave out what your own code does (`split_session`)."""
        app.query(HELLO)(self.hello)
        app.query(GENERATE)(self.generate)
        app.query(SECAGG)(answer_stage)
        if train:
            app.train(mods=[masked])(self.train)
        if evaluate:
            app.evaluate()(self.evaluate)

    def hello(self, message: Message, context: Context) -> Message:
        """Check this party's rows and model against the job, before anything is trained.

        Replies with a `PartyCard` and, where asked, with the initial arrays.

        Raises
        ------
        ConfigurationError
            If rows, labels or model do not fit.
        """
        config = message.content["config"]
        spec = SplitSpec.from_json(str(config["spec"]))
        rows = self._rows(context)
        metric_of(spec.task.kind)
        check_labels(rows, spec)
        counts = {"train": len(rows.train), "validation": len(rows.validation), "test": len(rows.test)}
        card = PartyCard(party=party_name(context), role=DATA_PARTY_ROLE, rows=counts, versions=package_versions())
        content = RecordDict({KEY: card.to_record()})
        if config["want-arrays"]:
            content["arrays"] = ArrayRecord(self._initial(spec, context))
        return Message(content, reply_to=message)

    def train(self, message: Message, context: Context) -> Message:
        """Train the round's steps and reply with the trained arrays."""
        self._set_threads(context)
        rows = self._rows(context)
        with self._session(message, context) as session:
            trained = train_round(session, rows, self._store(message, context))
        context.state["vflair"] = ConfigRecord({"round": session.server_round, "step": session.next_step})
        return session.reply(num_examples=trained.rows, metrics={"loss": trained.loss})

    def evaluate(self, message: Message, context: Context) -> Message:
        """Evaluate on a split of the party's own rows: ``config["split"]``, validation by default."""
        self._set_threads(context)
        config = message.content["config"]
        own = self._rows(context)
        rows = own.split(str(config.get("split", "validation")))
        with self._session(message, context) as session:
            prepare_defences(session, own)
            evaluated = evaluate_rows(session, rows)
            report = session.report()
        if config.get("report-rows", False):
            report = replace(report, scores=list(evaluated.scores), row_ids=list(evaluated.row_ids))
        metrics = {"loss": evaluated.loss, evaluated.metric: evaluated.score}
        return session.reply(num_examples=len(rows), metrics=metrics, report=report)

    def generate(self, message: Message, context: Context) -> Message:
        """Write texts for this party's own prompts; they stay here (`vflair_flower.clients.generation`)."""
        self._set_threads(context)
        return generate_texts(message, context, self._generation, self._session(message, context))

    def _session(self, message: Message, context: Context) -> AbstractContextManager[PartySession]:
        """Open the session that a message invites to."""
        return self._defended(message, context)

    @contextmanager
    def _defended(self, message: Message, context: Context) -> Iterator[PartySession]:
        """Open a session with what the party's defences have learnt so far."""
        store = self._store(message, context)
        with split_session(
            message,
            context,
            base_dir=self._base(context),
            record=recording_of(self._record, context),
            secret=Secret.kept(store.folder / SECRET),
            policy=self._policy(context) if callable(self._policy) else self._policy,
            account=store.folder / ACCOUNT,
        ) as session:
            saved = store.load(session.server_round - 1 if session.training else session.server_round)
            if saved is not None:
                session.shield.load_state_dict(saved.get("defences", {}))
            yield session

    def _store(self, message: Message, context: Context) -> PartyStore:
        offer = SessionOffer.from_content(message.content)
        return PartyStore(self._state(context), job=offer.job, party=offer.party)

    def _initial(self, spec: SplitSpec, context: Context) -> dict[str, Tensor]:
        """Return what all parties start from, drawn from the job's seed."""
        return trained_state(load_data_segment(spec, context, self._base(context)).model)

    def _base(self, context: Context) -> Path | None:
        return self._base_dir(context) if callable(self._base_dir) else self._base_dir

    def _state(self, context: Context) -> Path:
        return self._state_dir(context) if callable(self._state_dir) else self._state_dir

    def _set_threads(self, context: Context) -> None:
        threads = self._threads(context) if callable(self._threads) else self._threads
        if threads:
            torch.set_num_threads(threads)


def train_round(session: PartySession, rows: PartyRows, store: PartyStore) -> Trained:
    """Take a round's optimiser steps.

    The optimiser's state comes from the party's store, where it was left after the round before, and goes back there.
    """
    settings, spec = session.spec.training, session.spec
    encoded = _encoded(session, rows.train)
    session.prepare_defences(encoded)
    steps = settings.steps_of_round(session.server_round, len(encoded))
    session.total_steps, session.next_step = settings.total_steps(len(encoded)), steps.start
    optimizer = spec.optimizer.build(session.trainable_parameters())
    saved = store.load(session.server_round - 1)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        if session.ranks is not None:
            session.ranks.load_state(saved["ranks"])
        if session.privacy is not None:
            session.privacy.accountant.check_resumed(saved.get("privacy"))
    session.prepare_privacy(encoded)
    trained = train_steps(
        session.model,
        encoded,
        kind=spec.task.kind,
        steps=steps,
        total_steps=session.total_steps,
        order=session.privacy
        or BatchOrder(
            num_rows=len(encoded),
            batch_size=settings.batch_size,
            seed=spec.seed,
            party=session.party,
            lengths=tuple(len(row.input_ids) for row in encoded) if settings.group_by_length else (),
        ),
        optimizer=session.attach(optimizer),
        settings=spec.optimizer,
        pad_token_id=session.pad_token_id,
        seed=spec.seed,
        name=session.party,
        meter=session.meter,
        # A Poisson draw may be any number of rows, and no frame may hold more than a batch.
        micro_batch_size=settings.micro_batch_size or (settings.batch_size if session.privacy else None),
        before_step=session.weigh,
        by_rows=session.privacy,
    )
    ranks = {} if session.ranks is None else {"ranks": session.ranks.state()}
    state = {"optimizer": optimizer.state_dict(), "step": session.next_step, "defences": session.shield.state_dict()}
    private = {} if session.privacy is None else {"privacy": session.privacy.accountant.state()}
    store.save(session.server_round, {**state, **ranks, **private})
    return trained


def prepare_defences(session: PartySession, rows: PartyRows) -> None:
    """Let defences learn what they need from the party's training rows, if they have not yet."""
    if not all(one.ready for one in session.shield):
        session.prepare_defences(_encoded(session, rows.train))


def evaluate_rows(session: PartySession, rows: tuple[Example, ...]) -> Evaluated:
    """Measure the model on rows through the session."""
    return evaluate(
        session.model,
        _encoded(session, rows),
        kind=session.spec.task.kind,
        rows=rows,
        batch_size=session.spec.training.evaluation_batch_size,
        pad_token_id=session.pad_token_id,
    )


def _encoded(session: PartySession, rows: tuple[Example, ...]) -> Sequence[Encoded]:
    spec = session.spec
    encoded = encode_task(spec.task.kind, rows, session.tokenizer, max_tokens=spec.training.max_tokens)
    session.name_rows(encoded)
    return encoded


def check_labels(rows: PartyRows, spec: SplitSpec) -> None:
    """Raise DataError unless a party's labels are those of the job."""
    if spec.task.kind is not TaskKind.SEQUENCE_CLASSIFICATION:
        return
    if rows.label_names != spec.task.label_names:
        odd = sorted(set(rows.label_names) ^ set(spec.task.label_names))
        raise DataError(
            f"this party's data has {len(rows.label_names)} classes and the job {len(spec.task.label_names)}; "
            f"{'they differ in ' + ', '.join(map(repr, odd[:5])) if odd else 'their order differs'}. The model's task "
            "head has one output per class of the job: use the same label names, in the same order, at every party."
        )
    for split in ("train", "validation", "test"):
        for row in getattr(rows, split):
            if isinstance(row, Row) and not 0 <= row.label < len(spec.task.label_names):
                raise DataError(
                    f"row {row.id!r} of the split {split!r} has label {row.label}; the model takes 0 to "
                    f"{len(spec.task.label_names) - 1}. Correct the row or the label names."
                )
