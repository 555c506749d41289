"""Split learning as a Flower strategy: wraps the aggregator that a team already uses.

    with SplitLearning(spec=spec, aggregator=FedAvg()) as strategy:
        result = strategy.start(grid, num_rounds=6)

The wrapped aggregator samples parties and aggregates what they train (heads and tails); the body is trained by the
session, held here or by a node of its own.  Not here: anybody's rows, and in Head-Body-Tail any label.
"""

from logging import INFO
from pathlib import Path

from flwr.common.logger import log
from flwr.serverapp.strategy import Strategy
from safetensors.torch import save_file
from torch import Tensor

from vflair_flower.certificate import load_admitted_config
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import load_segment, refuse_trained_copies, resolve_model, save_merged_adapter
from vflair_flower.partition.footprint import footprint
from vflair_flower.partition.merging import SPEC_FILE, TRAINED_FILE
from vflair_flower.partition.structure import num_blocks
from vflair_flower.remote import BodyMode, SegmentServer, agreement_for
from vflair_flower.session import RecordingSettings
from vflair_flower.settings import one_of
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies.generation import WritingStrategy
from vflair_flower.strategies.hub_settings import HubSettings
from vflair_flower.strategies.sessions import SessionSettings


class SplitLearning(WritingStrategy):
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
    record : RecordingSettings or None
        Who records here what it sees (docs/recording.md); None records nothing.
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
        record: RecordingSettings | None = None,
    ) -> None:
        one_of("body_mode", str(body_mode), tuple(BodyMode))
        one_of("model_party", model_party, ("strategy", "node"))
        if spec.averaging == "step" and body_mode != BodyMode.SYNCHRONOUS:
            raise ConfigurationError(
                f"averaging is 'step' and body_mode is '{body_mode}': averaging waits for all parties at every step, "
                "and only 'synchronous' lets all of them step at once. Set averaging to 'round', or another body_mode."
            )
        source = resolve_model(spec.model, base_dir)
        config = load_admitted_config(source, spec.task)
        refuse_trained_copies(config, spec.plan, spec.task, spec.tuning)
        trained = footprint(source, spec).data_party.trained if spec.averaging == "step" else 0
        body = None
        if model_party == "strategy":
            segment = spec.plan.model_party(num_blocks(config))
            loaded = load_segment(source, segment, spec.task, weights=spec.weights, seed=spec.seed)
            body = SegmentServer(loaded, spec, body_mode=BodyMode(body_mode), deadline_s=deadline_s)
        super().__init__(
            sessions=SessionSettings(
                spec=spec,
                agreement=agreement_for(spec, config, trained_parameters=trained),
                hub=hub or HubSettings(),
                body_mode=BodyMode(body_mode),
                job=job,
                deadline_s=deadline_s,
                join_deadline_s=join_deadline_s,
                on_party_lost=on_party_lost,
                progress_s=progress_s,
                record=record,
            ),
            aggregator=aggregator,
            config=config,
            body=body,
            needs_model_party=body is None,
            hello_deadline_s=hello_deadline_s,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
        )

    def summary(self) -> None:
        """Log the strategy's settings."""
        plan = self.spec.plan
        log(INFO, "\t├──> Partition: %s, %d head and %d tail blocks", plan.mode, plan.head_blocks, plan.tail_blocks)
        holder = "the strategy" if self._body else "a node"
        log(INFO, "\t├──> Body: %s, held by %s", self._sessions.body_mode, holder)
        log(INFO, "\t├──> Hub: %s, deadline %g s", self._hub.address, self._sessions.deadline_s)
        log(INFO, "\t└──> Aggregator: %s", type(self.aggregator).__name__)
        self.aggregator.summary()

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
