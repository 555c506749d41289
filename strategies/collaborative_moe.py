"""PC-MoE (arXiv 2506.02965) as a Flower strategy: parties train one mixture-of-experts model, each hosting experts.

    spec = SplitSpec(model="org/moe", task=..., experts=ExpertSettings(), averaging="none")
    with CollaborativeMoE(spec=spec, aggregator=FedAvg()) as strategy:
        result = strategy.start(grid)

Each party keeps its rows and a model without experts of its own; it hosts a share of every layer's experts, which all
parties call through the hub.  Nothing is held here.  Where we differ from the paper: by default a token's expert
outputs return to its owner ("return"), which equals the whole model exactly; the paper hands the token on to the
expert's host, and leaves open what attention over tokens at different hosts would be; `ExpertSettings.semantics` has
our reading of that.
"""

from logging import INFO
from pathlib import Path

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from vflair_flower.certificate import load_admitted_config
from vflair_flower.errors import ConfigurationError
from vflair_flower.experts import expert_agreement, load_backbone, num_experts
from vflair_flower.experts.adapters import refuse_expert_tuning
from vflair_flower.experts.balance import refuse_balance
from vflair_flower.experts.body import BodyChannel, SpreadBody, joint_agreement
from vflair_flower.experts.handoff import hands_off, refuse_hand_off
from vflair_flower.experts.loading import backbone_parameters, layers_and_placement
from vflair_flower.experts.routing import check_job_routing
from vflair_flower.partition import refuse_trained_copies, resolve_model
from vflair_flower.partition.structure import num_blocks
from vflair_flower.remote import BodyMode, agreement_for
from vflair_flower.session import RecordingSettings
from vflair_flower.settings import DecodingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies.gathering import Gathering
from vflair_flower.strategies.generation import GenerationCounts, WritingStrategy
from vflair_flower.strategies.hub_settings import HubSettings
from vflair_flower.strategies.sessions import RoundSession, SessionSettings


class CollaborativeMoE(WritingStrategy):
    """Train a mixture-of-experts model whose experts are at many parties, round by round.

    Parameters
    ----------
    spec : SplitSpec
        With `experts`.  `averaging` says what becomes of the parties' own models: ``"none"`` keeps them private, as in
        the paper; ``"round"`` lets the aggregator average them; ``"step"`` averages gradients, so that ``"concurrent"``
        training is centralised training on the joined batch.
    aggregator : flwr.serverapp.strategy.Strategy
        Samples parties; must take all of them, for each hosts experts that no other has.
    hub : HubSettings
        Where parties dial.
    parties : int
        How many there will be; they are placed before they come.
    on_party_lost : str, optional
        Whether the round goes on without a lost party (``"continue"``) or the job stops (``"stop"``); by default it
        goes on where hosts may be skipped or replaced.  The next round needs all parties again.
    deadline_s, join_deadline_s, hello_deadline_s, job, checkpoint_dir, resume, base_dir, progress_s, record
        As in `SplitLearning`.

    Raises
    ------
    ConfigurationError
        Before anything runs, if the job does not fit the model or the parties.
    """

    def __init__(
        self,
        *,
        spec: SplitSpec,
        aggregator: Strategy,
        parties: int,
        hub: HubSettings | None = None,
        deadline_s: float = 120.0,
        join_deadline_s: float = 120.0,
        hello_deadline_s: float = 300.0,
        on_party_lost: str | None = None,
        job: str = "job",
        checkpoint_dir: Path | None = None,
        resume: bool = False,
        base_dir: Path | None = None,
        progress_s: float = 2.0,
        record: RecordingSettings | None = None,
    ) -> None:
        check_expert_job(spec)
        assert spec.experts is not None
        source = resolve_model(spec.model, base_dir)
        config = load_admitted_config(source, spec.task)
        refuse_balance(spec, config)
        names, placement = layers_and_placement(config, spec, [str(index) for index in range(parties)])
        layers, experts = len(names), num_experts(config)
        check_job_routing(config, spec.experts, placement)
        trained = backbone_parameters(config, spec)
        agreement = expert_agreement(spec, config, trained_parameters=trained)
        body = None
        if spec.experts.backbone == "split":
            refuse_trained_copies(config, spec.plan, spec.task, spec.tuning)
            agreement = joint_agreement(agreement, agreement_for(spec, config, trained_parameters=trained))
            segment, channel = spec.plan.model_party(num_blocks(config)), BodyChannel()
            loaded, _ = load_backbone(
                source, spec.task, weights=spec.weights, seed=spec.seed, segment=segment, channel=channel
            )
            body = SpreadBody(loaded, channel, (layers, experts), spec, deadline_s=deadline_s)
        super().__init__(
            sessions=SessionSettings(
                spec=spec,
                agreement=agreement,
                hub=hub or HubSettings(),
                body_mode=BodyMode.SYNCHRONOUS,
                job=job,
                deadline_s=deadline_s,
                join_deadline_s=join_deadline_s,
                on_party_lost=on_party_lost or ("stop" if spec.experts.on_host_lost == "fail" else "continue"),
                progress_s=progress_s,
                record=record,
            ),
            aggregator=aggregator,
            config=config,
            body=body,
            hello_deadline_s=hello_deadline_s,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
        )
        self._source = source
        self._shape = (layers, experts, parties)

    def _invite(self, asked: list[Message], server_round: int, *, training: bool) -> tuple[RoundSession, list[Message]]:
        parties = self._shape[2]
        if len(asked) != parties:
            raise ConfigurationError(
                f"the aggregator has sampled {len(asked)} parties for round {server_round}, and the experts are placed "
                f"at {parties}; every one of them is needed. Set the aggregator's fractions to 1, its minimum numbers "
                f"to {parties}, and see that all parties are on."
            )
        return super()._invite(asked, server_round, training=training)

    def generate(
        self, grid: Grid, decoding: DecodingSettings | None = None, *, timeout: float = 3600
    ) -> list[GenerationCounts]:
        """Have every party write texts (`WritingStrategy.generate`); refused with hand-off, which keeps no caches."""
        if hands_off(self.spec):
            assert self.spec.experts is not None
            raise ConfigurationError(
                f"semantics is {self.spec.experts.semantics!r}, and texts are written with key-value caches, which "
                "leads do not keep. Measure losses with `evaluate`, or train with semantics='return' to write."
            )
        return super().generate(grid, decoding, timeout=timeout)

    def export(self, grid: Grid, folder: Path, *, model_of: str | None = None, timeout: float = 3600) -> None:
        """Write what was trained as one checkpoint that plain ``from_pretrained`` loads, if every party agrees.

        Parties are asked first, and hand over their parts one layer after the other, so that no more than one layer's
        experts are in memory here.

        Parameters
        ----------
        grid : flwr.serverapp.Grid
            Flower's.
        folder : pathlib.Path
            Must not exist, or be empty.
        model_of : str, optional
            The party whose own model is taken; by default, the average of all parties' (one of them where the job
            averages).
        timeout : float
            Seconds, for each part.

        Raises
        ------
        ConfigurationError
            If a party does not share its part, and says so; nothing is written then.
        PartyLostError
            If a party does not answer.
        """
        if self._body is not None and self.spec.tuning is not None:
            raise ConfigurationError(
                "the backbone is split and tuned by LoRA, and the body's adapters are not merged by this version. "
                "Train all parameters (tuning=None), or leave the backbone whole, to export."
            )
        watching = self._watch(grid)
        if not self.cards:
            self._meet(watching, None)
        nodes = {self.cards[node].party: node for node in self._data_nodes() or ()}
        gathering = Gathering(
            grid=watching,
            spec=self.spec,
            config=self.config,
            job=self._sessions.job,
            nodes=nodes,
            body={} if self._body is None else self._body.module.state_dict(),
            server_round=self._newest_round,
            arrays=self.arrays,
            timeout_s=timeout,
        )
        gathering.write(self._source, folder, model_of=model_of)

    def summary(self) -> None:
        """Log the strategy's settings."""
        settings = self.spec.experts
        assert settings is not None
        layers, experts, parties = self._shape
        shape = (experts, layers, parties, settings.placement)
        log(INFO, "\t├──> Experts: %d in each of %d layers, over %d parties (%s)", *shape)
        log(INFO, "\t├──> Schedule: %s, combined at the %s", settings.schedule, settings.combine)
        log(INFO, "\t├──> Hub: %s, deadline %g s", self._hub.address, self._sessions.deadline_s)
        log(INFO, "\t└──> Aggregator: %s", type(self.aggregator).__name__)
        self.aggregator.summary()


def check_expert_job(spec: SplitSpec) -> None:
    """Raise ConfigurationError for a specification that experts at many parties cannot be trained by."""
    if spec.experts is None:
        raise ConfigurationError("experts is not set in the job's specification; set experts=ExpertSettings().")
    refuse_expert_tuning(spec)
    refuse_hand_off(spec)
    if spec.averaging == "step" and spec.experts.schedule != "concurrent":
        raise ConfigurationError(
            f"averaging is 'step' and the schedule {spec.experts.schedule!r}: averaging waits for all parties at every "
            "step, and only 'concurrent' lets all of them step at once. Set averaging to 'none' or 'round'."
        )
    if spec.optimizer.max_grad_norm:
        raise ConfigurationError(
            f"max_grad_norm is {spec.optimizer.max_grad_norm}; gradients are not clipped over a model whose experts "
            "are at many parties. Set it to 0."
        )
    if spec.weights.quantization != "none" or spec.scope != "full":
        raise ConfigurationError(
            f"quantization is {spec.weights.quantization!r} and scope {spec.scope!r}; a model whose experts are spread "
            "is trained whole. Set them to 'none' and 'full'."
        )
