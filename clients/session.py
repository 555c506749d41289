"""The way into a session for a team with its own training code: from a Flower message to a model with holes.

    @app.train()
    def train(message, context):
        with split_session(message, context) as session:
            optimizer = session.attach(torch.optim.AdamW(session.trainable_parameters()))
            for batch in my_batches:
                session.model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return session.reply(num_examples=len(my_rows), metrics={"loss": ...})

Leaving the block with an exception tells the hub at once; leaving it well says goodbye.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from vflair_flower.clients.recording import PartyRecording, party_recording
from vflair_flower.clients.secure import check_masked
from vflair_flower.clients.segment import DataSegment, load_data_segment
from vflair_flower.clients.trainer import StepWithTrainer
from vflair_flower.control import KEY, RoundReport, SessionOffer
from vflair_flower.errors import ConfigurationError
from vflair_flower.memory import ActivationMeter, MemoryParts, optimizer_bytes, process_peak_bytes, tensor_bytes
from vflair_flower.partition import load_tokenizer, load_trained_state, trained_state
from vflair_flower.partition.ranks import RankBudget
from vflair_flower.privacy import Policy, Secret, Shield
from vflair_flower.privacy.masked_party import COVER
from vflair_flower.privacy.opening import open_shield, prepare_defences
from vflair_flower.remote import RemoteSegment, parameter_counts
from vflair_flower.remote.averaging import average_gradients
from vflair_flower.remote.clipping import clip_gradients
from vflair_flower.remote.protocol import AVERAGER, FINISH
from vflair_flower.remote.segment import StepCalls
from vflair_flower.session import Agreement, Guard, Link, RecordingSettings, Tap, connect
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import Encoded, collate
from vflair_flower.training.row_losses import losses_per_row

if TYPE_CHECKING:
    from vflair_flower.privacy.dpsgd import PrivateTraining

Number = int | float


class PartySession:
    """A data party's side of an open session; made by `split_session`.

    Attributes
    ----------
    model : torch.nn.Module
        The task model with holes (a `PeftModel` under LoRA), global adapters loaded; call it as any transformers model.
    spec : SplitSpec
        What the job agreed on.
    party, server_round, training
        Who this is and what the session is for.
    """

    def __init__(
        self,
        message: Message,
        own: DataSegment,
        link: Link,
        remote: StepCalls,
        recording: PartyRecording | None = None,
        shield: Shield | None = None,
        privacy: "PrivateTraining | None" = None,
    ) -> None:
        offer = SessionOffer.from_content(message.content)
        self.spec = own.spec
        self.party = offer.party
        self.server_round = offer.server_round
        self.training = offer.training
        self.model = own.model
        self.total_steps = 0
        """Optimiser steps of the whole job, if known: the model party's learning rate follows the same schedule."""
        self.next_step = 0
        """Number of the next optimiser step over the whole job; counts up."""
        self.meter = ActivationMeter(own.model)
        self.ranks = RankBudget.of(own.model)
        """What is left of AdaLoRA's ranks, if the job tunes by it; its state goes from round to round."""
        self.shield = Shield() if shield is None else shield
        """The job's defences, applied to all that is sent; what they learn is trained with the model."""
        self.privacy = privacy
        """DP-SGD, if the job trains by it: draws rows, takes their losses, and says what they have cost."""
        self._own = own
        self._link = link
        self._remote = remote
        self._steps = 0
        self._started = time.monotonic()
        self._optimizers: list[torch.optim.Optimizer] = []
        self._reply_to = message
        self._source = own.source
        self._recording = recording or PartyRecording()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with a pad token."""
        return load_tokenizer(self._source)

    @property
    def pad_token_id(self) -> int:
        """Id of the token that fills rows up."""
        return int(self.tokenizer.pad_token_id)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what this party trains."""
        return [p for part in (self.model, self.shield) for p in part.parameters() if p.requires_grad]

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Let the model party step whenever `optimizer` has stepped; returns the optimiser.

        Where the job averages at every step, the gradients are averaged right before.
        """
        optimizer.register_step_pre_hook(lambda *_: self.before_step())
        optimizer.register_step_post_hook(lambda *_: self.step())
        self.measure(optimizer)
        return optimizer

    def step(self) -> None:
        """Tell the model party that an optimiser step is due; `attach` does it by itself."""
        self._remote.step(step=self.next_step, total_steps=self.total_steps)
        if self.ranks is not None:
            self.ranks.after_step(self.next_step, self.total_steps)
        self.next_step += 1
        self._steps += 1

    def before_step(self) -> None:
        """Average gradients with the other parties', and clip them, where the job does so; `attach` calls it."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.privacy is not None:  # noise comes before anything of the gradients leaves
            self.privacy.release()
            self._remote.rows_since_step = self.privacy.expected_rows
        if self.spec.averaging == "step":
            covers = () if self.privacy is None else self.privacy.marks
            average_gradients(self._link, trained, rows=self._remote.rows_since_step, covers=covers)
        if self.spec.optimizer.max_grad_norm:
            clip_gradients(trained.values(), self._remote, self.spec.optimizer)
        if self.ranks is not None:
            self.ranks.add_penalty()

    def weigh(self, items: int) -> None:
        """Say over how many items (rows, windows or asked tokens) the coming step's loss is the mean.

        By default a step weighs as many rows as went through the model since the last one; under DP-SGD always the
        expected number.
        """
        self._remote.rows_since_step = items

    def measure(self, optimizer: torch.optim.Optimizer) -> None:
        """Count an optimiser's state as this party's memory; `attach` and the Trainer's callback do it."""
        if not any(known is optimizer for known in self._optimizers):
            self._optimizers.append(optimizer)

    def trainer_callback(self, *, own_rate: bool = False) -> TrainerCallback:
        """Return a callback that does for a `Trainer` of transformers or TRL what `attach` does for an optimiser.

        Where `total_steps` is not set, it is the Trainer's own number of steps.  Arguments that would change this
        party's part of the model alone are refused when training starts.

        Parameters
        ----------
        own_rate : bool
            Whether the Trainer's learning rate may differ from the job's, by which the model party steps.
        """
        return StepWithTrainer(self, own_rate=own_rate)

    def prepare_defences(self, encoded: Sequence[Encoded]) -> None:
        """Let defences that must learn something first do so, from this party's own rows; others need nothing.

        Does nothing for those that are ready.  Keep ``shield.state_dict()`` for the next session.
        """
        if isinstance(self._remote, RemoteSegment):  # jobs with spread experts have no such defences
            prepare_defences(
                self.shield, encoded, self.model, self._own.channel, self._remote, pad_token_id=self.pad_token_id
            )

    def penalty(self) -> torch.Tensor:
        """Return what defences add to a loss of your own; the loss that the model returns has it already."""
        added = self.shield.penalty()
        return torch.zeros(()) if added is None else added

    def name_rows(self, encoded: Iterable[Encoded]) -> None:
        """Say whose tokens are whose, for the truth that this party writes for itself if it records (`record`)."""
        self._recording.name_rows(encoded)

    def report(self) -> RoundReport:
        """Return what was measured so far."""
        held, trained = parameter_counts(self.model)
        return RoundReport(
            party=self.party,
            role="data party",
            steps=self._steps,
            tokens=self._remote.tokens,
            seconds=time.monotonic() - self._started,
            parameters_held=held,
            parameters_trained=trained,
            memory=self.memory().to_json(),
            process_peak_bytes=process_peak_bytes(),
            privacy={} if self.privacy is None else self.privacy.summary(),
        )

    def prepare_privacy(self, encoded: Sequence[Encoded]) -> None:
        """Under DP-SGD, say which rows are trained on: works out the noise, and tries rows' gradients; else nothing.

        Set `total_steps` first.

        Raises
        ------
        ConfigurationError
            The settings do not fit the rows, or this party's segment cannot be trained privately.
        """
        if self.privacy is None:
            return
        kind = self.spec.task.kind

        def loss_of(rows: Sequence[Encoded]) -> torch.Tensor:
            batch = collate(list(rows), pad_token_id=self.pad_token_id)
            with self.shield.resting(), self._calling_nobody():
                return losses_per_row(self.model(**batch.inputs), batch.inputs, kind)

        self.privacy.begin(
            encoded, batch_size=self.spec.training.batch_size, total_steps=self.total_steps, loss_of=loss_of
        )

    def _calling_nobody(self) -> AbstractContextManager[None]:
        """Let something of the right shape stand in for other parties' parts of the model inside a block."""
        from vflair_flower.privacy.dpsgd.standin import StandIn

        return self._own.channel.joined(StandIn(self.spec, self._own.loaded.model.config))

    def memory(self) -> MemoryParts:
        """Return the peak memory of this party's segment, by part."""
        trained = self.trainable_parameters() if self.training else []
        return MemoryParts(
            parameters=tensor_bytes(self.model.parameters()),
            gradients=tensor_bytes(trained),
            optimizer=sum(optimizer_bytes(o) for o in self._optimizers),
            activations=self.meter.peak_bytes,
        )

    def reply(
        self,
        *,
        num_examples: int,
        metrics: Mapping[str, Number] | None = None,
        report: RoundReport | None = None,
    ) -> Message:
        """Return the Flower reply: trained arrays (after training), metrics, and what was measured.

        Parameters
        ----------
        num_examples : int
            Rows trained or evaluated on; the aggregator's weight.
        metrics : mapping, optional
            More numbers for the aggregator to average.
        report : RoundReport, optional
            As `report()` by default.
        """
        if self.privacy is not None:  # what is measured on training rows has no noise, and neither has their number
            num_examples, metrics = self.privacy.public_examples, {}
        values: dict[str, Any] = {"num-examples": num_examples, **(metrics or {})}
        content = RecordDict({"metrics": MetricRecord(values), KEY: (report or self.report()).to_record()})
        if self.training:
            covers = () if self.privacy is None else self.privacy.covers()
            if self.spec.secure_aggregation is not None:
                check_masked()
                covers = (*covers, COVER)
            state = self._shared_state()
            if self.shield.policy is not None:
                self.shield.policy.check_state(state, covers=covers)
            content["arrays"] = ArrayRecord(state)
        return Message(content, reply_to=self._reply_to)

    def finish(self) -> None:
        """Tell the others that no more steps come, so that nobody waits for them; the end of the block does it."""
        if self.training and self.spec.averaging == "step":
            self._link.call(AVERAGER, FINISH, {})
        self._remote.finish()

    def _shared_state(self) -> dict[str, torch.Tensor]:
        return trained_state(self.model)


@contextmanager
def split_session(
    message: Message,
    context: Context,
    *,
    base_dir: Path | None = None,
    record: RecordingSettings | None = None,
    secret: Secret | None = None,
    policy: Policy | None = None,
    account: Path | None = None,
) -> Iterator[PartySession]:
    """Open the session that a train or evaluate message invites to.

    Parameters
    ----------
    message : flwr.app.Message
        Sent by `vflair_flower.strategies.SplitLearning`.
    context : flwr.app.Context
        The node's; ``node_config["model-path"]`` overrides where this party finds the model.
    base_dir : pathlib.Path, optional
        What a relative model folder is relative to.
    record : RecordingSettings, optional
        Where this party writes the truth behind its calls, for itself (docs/recording.md); None writes nothing.
    secret : Secret, optional
        What this party's defences draw from, the same in all sessions of a job (`Secret.kept`); by default each session
        has another.
    policy : Policy, optional
        What may leave this party at all; by default only the job's defences are enforced.
    account : pathlib.Path, optional
        Under DP-SGD, the file that holds what this party's rows have cost, the same in all sessions of a job.

    Yields
    ------
    PartySession
        With the model ready to be trained or evaluated.

    Raises
    ------
    ConfigurationError
        If the message is not ours, or this party's model does not fit the job.
    SessionError
        If the hub cannot be reached, refuses the ticket, or goes away.
    """
    offer = SessionOffer.from_content(message.content)
    spec = SplitSpec.from_json(offer.spec)
    if spec.secure_aggregation is not None and offer.training:
        check_masked()  # before the work, and again before the reply
    own = load_data_segment(spec, context, base_dir)
    arrays = next(iter(message.content.array_records.values()), None)
    if arrays:
        load_trained_state(own.model, arrays.to_torch_state_dict())
    own.model.train(offer.training)
    occasion = occasion_of(offer, own.spec)
    shield = open_shield(
        own.spec, own.loaded, own.source, party=offer.party, occasion=occasion, secret=secret, policy=policy
    )
    shield.train(offer.training)
    private = open_private(own, shield, offer, account, secret)
    with (
        party_recording(record, offer, own.model) as recording,
        shield.watching(own.model, own.channel),
        connect_to(offer, recording.tap, shield.guard) as link,
    ):
        remote = RemoteSegment(link, own.spec, shield=shield)
        if recording.truth is not None:
            recording.truth.order = lambda: remote.sent_rows
        remote.privacy = private
        with own.channel.joined(remote):
            session = PartySession(message, own, link, remote, recording, shield, private)
            yield session
            session.finish()


def occasion_of(offer: SessionOffer, spec: SplitSpec) -> str:
    """Return what names a session's noise: new in every one, unless a job wants the same whenever it is run."""
    return f"round {offer.server_round}, {offer.training}" if spec.defence_seed else offer.session


def open_private(
    own: DataSegment, shield: Shield, offer: SessionOffer, account: Path | None, secret: Secret | None, hosts: int = 0
) -> "PrivateTraining | None":
    """Return a party's DP-SGD, None without; `hosts` says how many parties train experts, where they are spread."""
    if own.spec.privacy is None or not offer.training:
        return None
    from vflair_flower.privacy.dpsgd import Accountant, refuse_shield
    from vflair_flower.privacy.dpsgd import PrivateTraining as Private

    spec = own.spec
    if account is None:
        raise ConfigurationError(
            "the job trains by DP-SGD, and there is no file for the account of what this party's rows cost: every "
            "session would begin at nothing. Give the session an account, the same path in all sessions of the job."
        )
    refuse_shield(shield)
    repeatable = Secret.repeatable(spec.defence_seed, offer.party) if spec.defence_seed else None
    return Private(
        own.model,
        own.spec.privacy,
        accountant=Accountant(own.spec.privacy, account),
        secret=repeatable or secret or Secret.fresh(),
        occasion=occasion_of(offer, spec),
        body_trained=spec.scope == "full" if spec.experts is None else hosts > 0,
        repeatable=repeatable is not None,
        bodies=max(hosts, 1),
    )


def connect_to(offer: SessionOffer, tap: Tap | None = None, guard: Guard | None = None) -> Link:
    """Dial the hub of an offer; raises TicketError or SessionError if it does not let this party in.

    Parameters
    ----------
    offer : SessionOffer
        The invitation.
    tap : Tap, optional
        Sees every frame of the link.
    guard : Guard, optional
        Looks at every frame before it leaves.
    """
    return connect(
        offer.address,
        session=offer.session,
        party=offer.party,
        ticket=offer.ticket,
        agreement=Agreement.from_json(offer.agreement),
        deadline_s=offer.deadline_s,
        root_certificates=offer.root_certificates.encode() or None,
        allow_plaintext=offer.allow_plaintext,
        tap=tap,
        guard=guard,
    )
