"""A party of PC-MoE: owns rows and a model without experts, and hosts some experts of every layer for all parties.

    app = ClientApp()
    ExpertParty(my_rows, state_dir=Path("state")).register(app)

It trains and serves at the same time, until every party is done.  Its own model and its experts stay in its own files
between rounds; its own model leaves it only where the job averages (`SplitSpec.averaging`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from vflair_flower.certificate import load_admitted_config
from vflair_flower.clients.data_party import ACCOUNT, DataParty, PartyRows
from vflair_flower.clients.generation import TextGeneration, generate_texts
from vflair_flower.clients.handover import MODELS, Consent, hand_over
from vflair_flower.clients.recording import PartyRecording, Record, party_recording, recording_of
from vflair_flower.clients.segment import DataSegment
from vflair_flower.clients.session import PartySession, connect_to, open_private
from vflair_flower.clients.store import PartyStore
from vflair_flower.control import HAND_OVER, PartRequest, RoundReport, SessionOffer
from vflair_flower.errors import CheckpointError, ConfigurationError
from vflair_flower.experts import (
    ExpertCaller,
    ExpertChannel,
    ExpertHost,
    Placement,
    PrivateTokens,
    load_backbone,
    load_experts,
    num_experts,
    rare_tokens,
    route_locally,
    tune_experts,
    tune_own,
)
from vflair_flower.experts.balance import BALANCER, balances_jointly, exchange_over, load_balance
from vflair_flower.experts.blocks import LentChannel
from vflair_flower.experts.body import BodyLink, StepsOfBoth
from vflair_flower.experts.handoff import hands_off
from vflair_flower.experts.leads import Lead
from vflair_flower.experts.loading import layers_and_placement, own_segment
from vflair_flower.experts.private import PrivateExperts, StandInExperts, training_hosts
from vflair_flower.experts.recompute import checkpoint_owner
from vflair_flower.memory import MemoryParts
from vflair_flower.partition import (
    LoadedSegment,
    ModelSource,
    load_tokenizer,
    load_trained_state,
    resolve_model,
    trained_state,
)
from vflair_flower.privacy import Secret, Shield
from vflair_flower.privacy.learnt import SECRET
from vflair_flower.remote import RemoteSegment, parameter_counts
from vflair_flower.remote.protocol import FINISH
from vflair_flower.remote.segment import StepCalls
from vflair_flower.session import Link, RecordingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import encode_task

if TYPE_CHECKING:
    from vflair_flower.privacy.dpsgd import PrivateTraining

_WAIT_FOR_OTHERS = 10.0
"""How many deadlines a party that is done serves the others."""


class ExpertSession(PartySession):
    """An open session of a party that trains and hosts; made by `expert_session`.

    Attributes
    ----------
    host : ExpertHost
        This party's own experts.
    lost_hosts : dict[str, str]
        Hosts that did not answer well, and what was seen.
    """

    def __init__(
        self,
        message: Message,
        own: DataSegment,
        link: Link,
        calls: StepCalls,
        host: ExpertHost,
        lost_hosts: dict[str, str],
        lead: Lead | None = None,
        recording: PartyRecording | None = None,
        privacy: "PrivateTraining | None" = None,
        *,
        channel: ExpertChannel,
    ) -> None:
        super().__init__(message, own, link, calls, recording, privacy=privacy)
        self.host = host
        self._channel = channel
        self.lost_hosts = lost_hosts
        self._lead = lead

    def before_step(self) -> None:
        """Add what others' steps have left for this party's own model, then as everywhere."""
        if self._lead is not None:
            self._lead.add_gradients()
        super().before_step()

    def report(self) -> RoundReport:
        """Return what was measured so far, experts included."""
        report = super().report()
        held, trained = parameter_counts(self.host.module)
        return replace(
            report,
            parameters_held=report.parameters_held + held,
            parameters_trained=report.parameters_trained + trained,
        )

    def memory(self) -> MemoryParts:
        """Return the peak memory of this party's own model and its experts together, by part."""
        own, more = super().memory().to_json(), [self.host.memory().to_json()]
        if self._lead is not None:
            more.append(self._lead.memory().to_json())
        return MemoryParts(**{name: count + sum(part[name] for part in more) for name, count in own.items()})

    def finish(self) -> None:
        """Tell the others that no more steps come."""
        if self.training and balances_jointly(self.spec):
            self._link.call(BALANCER, FINISH, {})
        super().finish()

    def _calling_nobody(self) -> AbstractContextManager[None]:
        return self._channel.joined(StandInExperts())

    def _shared_state(self) -> dict[str, Tensor]:
        return {} if self.spec.averaging == "none" else super()._shared_state()


class ExpertParty(DataParty):
    """The client side of `CollaborativeMoE`.

    Parameters
    ----------
    rows, state_dir, base_dir, threads, generation
        As of `DataParty`.
    record
        As of `DataParty`; with ``"host:NAME"`` and this party's name also what it sees as a host.
    private_tokens : callable, optional
        This party's own rule of which tokens go to its own experts alone, in place of the job's `private_share`: given
        the token ids of a pass, ``[B, T]``, returns as many bools.  In generation a pass is one token a row.
    share_experts, share_model : bool
        Whether this party hands over its experts, and its own model, when `CollaborativeMoE.export` asks; a model that
        the job averages is the strategy's anyway.
    """

    def __init__(
        self,
        rows: Callable[[Context], PartyRows],
        *,
        state_dir: Path | Callable[[Context], Path],
        base_dir: Path | Callable[[Context], Path | None] | None = None,
        threads: int | Callable[[Context], int] = 0,
        generation: TextGeneration | None = None,
        share_experts: bool = False,
        share_model: bool = False,
        record: Record = None,
        private_tokens: PrivateTokens | None = None,
    ) -> None:
        super().__init__(
            rows, state_dir=state_dir, base_dir=base_dir, threads=threads, generation=generation, record=record
        )
        self._consent = Consent(experts=share_experts, model=share_model)
        self._own_private_tokens = private_tokens

    def register(self, app: ClientApp, *, train: bool = True, evaluate: bool = True) -> None:
        """Register with a ClientApp; leave out what your own code does (`expert_session`)."""
        super().register(app, train=train, evaluate=evaluate)
        app.query(HAND_OVER)(self.hand_over)

    def hand_over(self, message: Message, context: Context) -> Message:
        """Hand over a part of the finished model, if this party shares it (`vflair_flower.clients.handover`)."""
        request = PartRequest.from_content(message.content)
        source = _source(SplitSpec.from_json(request.spec), context, self._base(context))
        return hand_over(message, source, self._consent, state_dir=self._state(context) / MODELS)

    def generate(self, message: Message, context: Context) -> Message:
        """Write texts for this party's own prompts, and host its experts for all; without prompts, only host."""
        self._set_threads(context)
        session = self._session(message, context)
        return generate_texts(message, context, self._generation, session, prompts_needed=False)

    def _session(self, message: Message, context: Context) -> AbstractContextManager[ExpertSession]:
        store = self._store(message, context)
        return expert_session(
            message,
            context,
            state_dir=self._state(context),
            base_dir=self._base(context),
            record=recording_of(self._record, context),
            private_tokens=self._private_tokens(message, context),
            secret=Secret.kept(store.folder / SECRET),
            account=store.folder / ACCOUNT,
        )

    def _private_tokens(self, message: Message, context: Context) -> PrivateTokens | None:
        spec = SplitSpec.from_json(SessionOffer.from_content(message.content).spec)
        if self._own_private_tokens is not None or spec.experts is None or not spec.experts.private_share:
            return self._own_private_tokens
        source = _source(spec, context, self._base(context))
        tokenizer, kind = load_tokenizer(source), spec.task.kind
        encoded = encode_task(kind, self._rows(context).train, tokenizer, max_tokens=spec.training.max_tokens)
        return rare_tokens(
            encoded,
            share=spec.experts.private_share,
            vocabulary=int(load_admitted_config(source, spec.task).get_text_config().vocab_size),
            special_ids=tokenizer.all_special_ids,
        )

    def _initial(self, spec: SplitSpec, context: Context) -> dict[str, Tensor]:
        source = _source(spec, context, self._base(context))
        if spec.averaging == "none":
            return {}
        return trained_state(_own_model(source, spec)[1])


@contextmanager
def expert_session(
    message: Message,
    context: Context,
    *,
    state_dir: Path,
    base_dir: Path | None = None,
    record: RecordingSettings | None = None,
    private_tokens: PrivateTokens | None = None,
    secret: Secret | None = None,
    account: Path | None = None,
) -> Iterator[ExpertSession]:
    """Open the session that a train or evaluate message invites to, and serve this party's experts in it.

    At the end it waits until all parties are done, and keeps what was trained here for the next round.

    Parameters
    ----------
    message : flwr.app.Message
        Sent by `vflair_flower.strategies.CollaborativeMoE`.
    context : flwr.app.Context
        The node's; ``node_config["model-path"]`` overrides where this party finds the model.
    state_dir : pathlib.Path
        Folder of this party's own.
    base_dir : pathlib.Path, optional
        What a relative model folder is relative to.
    record : RecordingSettings, optional
        Where this party writes the truth behind its calls, for itself, and what it sees as a host of experts
        (docs/recording.md); None writes nothing.
    private_tokens : callable, optional
        As of `ExpertParty`; needed where the job has a `private_share` (`vflair_flower.experts.rare_tokens`).
    secret, account
        As of `split_session`: under DP-SGD, this party's own secret, and the file of what its rows have cost.

    Yields
    ------
    ExpertSession
        With the model ready to be trained or evaluated; call it as any transformers model.

    Raises
    ------
    ConfigurationError
        If the message is not ours, or this party's model does not fit the job.
    CheckpointError
        If experts here have copies elsewhere, and are not of the same round.
    PartyLostError
        If a host is lost and the job is to fail then.
    """
    offer = SessionOffer.from_content(message.content)
    spec = SplitSpec.from_json(offer.spec)
    source = _source(spec, context, base_dir)
    loaded, model, channel = _own_model(source, spec)
    host, placement = _host(source, spec, offer)
    store = PartyStore(state_dir / MODELS, job=offer.job, party=offer.party)
    # An evaluation after round r runs on what round r left; training in round r on what the round before left.
    newest = offer.server_round - 1 if offer.training else offer.server_round
    saved = store.load(newest)
    if placement.replicas > 1 and newest > 0 and not store.has(newest):
        raise CheckpointError(
            f"party '{offer.party}' has not ended round {newest} or has lost its state, and copies of its experts have "
            "gone on at other parties; its own are no longer the same. The others go on without it where the job lets "
            "copies stand in; to have it back, resume from the last round that all parties have ended."
        )
    if saved is not None:
        host.load_state(saved["host"])
        load_trained_state(model, saved["own"])
    arrays = next(iter(message.content.array_records.values()), None)
    if arrays:
        load_trained_state(model, arrays.to_torch_state_dict())
    model.train(offer.training)
    lead = None
    if hands_off(spec):
        waiting = {} if saved is None else saved["waiting"]
        lead = Lead(loaded, model, channel, host, placement, spec, party=offer.party, waiting=waiting)
    host.begin(offer.parties, training=offer.training)
    own = DataSegment(spec=spec, source=source, loaded=loaded, model=model)
    private = open_private(own, Shield(), offer, account, secret, training_hosts(spec, placement))
    with (
        party_recording(record, offer, model) as recording,
        connect_to(offer, recording.tap) as link,
        _leading(lead, link, offer),
    ):
        link.on_lost(lambda party, _reason: (lead or host).leave(party, lost=True))
        link.serve(lead or host)
        caller = ExpertCaller(link, host, placement, spec)
        caller.privacy = private
        caller.watch = None if recording.truth is None else recording.truth.sent
        body = RemoteSegment(BodyLink(link), spec)
        try:
            assert spec.experts is not None
            routing = route_locally(model, spec.experts, placement, offer.party, private_tokens)
            exchange = exchange_over(link) if offer.training and balances_jointly(spec) else None
            with (
                channel.joined(caller),
                loaded.channel.joined(body),
                routing,
                load_balance(model, spec, exchange),
            ):
                calls: StepCalls = caller if loaded.segment.is_whole else StepsOfBoth(caller, body)
                session = ExpertSession(
                    message, own, link, calls, host, caller.lost, lead, recording, private, channel=channel
                )
                yield session
                session.finish()
            host.wait_for_owners(_WAIT_FOR_OTHERS * offer.deadline_s)
        finally:
            caller.close()
    if offer.training:
        kept: dict[str, Any] = {"own": trained_state(model, copied=False), "host": host.state()}
        if lead is not None:
            kept["waiting"] = lead.state()
        store.save(offer.server_round, kept)


def _leading(lead: Lead | None, link: Link, offer: SessionOffer) -> AbstractContextManager[object]:
    if lead is None:
        return nullcontext()
    return lead.joined(link, offer.parties, training=offer.training, deadline_s=offer.deadline_s)


def _own_model(source: ModelSource, spec: SplitSpec) -> tuple[LoadedSegment, nn.Module, ExpertChannel]:
    """Load what this party has of the model without experts; the second is ready for training."""
    if spec.experts is None:
        raise ConfigurationError("the message is of a job without experts; register a DataParty for it.")
    segment = own_segment(load_admitted_config(source, spec.task), spec)
    joint = LentChannel() if hands_off(spec) else ExpertChannel()
    loaded, channel = load_backbone(
        source, spec.task, weights=spec.weights, seed=spec.seed, segment=segment, channel=joint, experts=spec.experts
    )
    model = tune_own(loaded, spec)
    if spec.training.gradient_checkpointing:
        checkpoint_owner(loaded, channel)
    return loaded, model, channel


def _host(source: ModelSource, spec: SplitSpec, offer: SessionOffer) -> tuple[ExpertHost, Placement]:
    config = load_admitted_config(source, spec.task)
    names, placement = layers_and_placement(config, spec, offer.parties)
    own = placement.experts_of(offer.party)
    by_name = dict(zip(names, own, strict=True))
    module = load_experts(source, by_name, spec.task, weights=spec.weights)
    tune_experts(module, by_name, spec, of=num_experts(config))
    private = None
    if offer.training:
        private = PrivateExperts.of(spec, placement, offer.party, server_round=offer.server_round)
    return ExpertHost(module, names, own, spec, deadline_s=offer.deadline_s, private=private), placement


def _source(spec: SplitSpec, context: Context, base_dir: Path | None) -> ModelSource:
    return resolve_model(str(context.node_config.get("model-path", spec.model)), base_dir)
