"""A rehearsal: a real session of one owner and all hosts of its model's experts, with what crossed and what is true.

The parties are those of a job: models without experts and shares of experts from one checkpoint, joined by a hub, every
tensor checked against the agreement; only the network is left out.  Other parties host and own nothing here.
U tokens of a call, B rows, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vflair_flower.attacks.experts.truth import MoeTruth
from vflair_flower.attacks.experts.view import HostView, host_view
from vflair_flower.attacks.guesses import NOTHING
from vflair_flower.attacks.registry import Phase
from vflair_flower.attacks.rehearsal import DEADLINE_S, encode_victims, keeping, rehearsed, run_victim
from vflair_flower.attacks.scoring import Truth
from vflair_flower.errors import ConfigurationError
from vflair_flower.experts.caller import ExpertCaller
from vflair_flower.experts.dispatch import Answer
from vflair_flower.experts.host import ExpertHost
from vflair_flower.experts.loading import layers_and_placement, load_backbone, load_experts
from vflair_flower.experts.placement import Placement
from vflair_flower.experts.protocol import expert_agreement
from vflair_flower.experts.routing import route_locally
from vflair_flower.experts.token_routing import PrivateTokens
from vflair_flower.partition import ModelSource, make_trainable
from vflair_flower.partition.sources import load_config
from vflair_flower.session import Agreement, Hub, Sighting
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import (
    IGNORED,
    Encoded,
    EncodedText,
    Example,
    padding_token_id,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class MoeRehearsal:
    """What came of a session.

    Parameters
    ----------
    sightings : tuple of Sighting
        All that passed the hub, with copies of the tensors.
    truth : MoeTruth
        For the scorer alone.
    placement, spec
        Of the job.
    owner : str
        Whose rows they were.
    """

    sightings: tuple[Sighting, ...]
    truth: MoeTruth
    placement: Placement
    spec: SplitSpec
    owner: str

    @property
    def others(self) -> tuple[str, ...]:
        """All hosts but the owner's own."""
        return tuple(host for host in self.placement.hosts if host != self.owner)

    def view(self, *hosts: str) -> HostView:
        """Return what a coalition saw; of all other hosts without names."""
        return host_view(self.sightings, hosts=hosts or self.others, placement=self.placement, spec=self.spec)


def moe_rehearsal(
    source: ModelSource,
    spec: SplitSpec,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    parties: int = 4,
    owner: int = 0,
    phase: Phase | str = Phase.INFERENCE,
    batch_rows: int = 8,
    new_tokens: int = 16,
    private_tokens: PrivateTokens | None = None,
) -> MoeRehearsal:
    """Let an owner run its rows through a model whose experts are at all parties, once.

    Parameters
    ----------
    source : ModelSource
        The checkpoint that all hold their parts of.
    spec : SplitSpec
        The job; gives task, experts' settings, wire and lengths.  Nothing is tuned: no optimiser step is taken.
    rows : sequence of examples
        The owner's.
    tokenizer : PreTrainedTokenizerBase
        The model's.
    parties, owner : int
        How many there are, and which of them has the rows.
    phase : Phase
        ``"inference"``: forward passes without gradients; ``"training"``: forward and backward passes;
        ``"generation"``: prompts, and greedy tokens after them, through a cache.
    batch_rows : int
        Rows per batch.
    new_tokens : int
        How many tokens are written, in ``"generation"``; the last one goes to no host.
    private_tokens : callable, optional
        The owner's rule of which tokens go to its own experts alone.

    Raises
    ------
    ConfigurationError
        The job does not spread experts, or does so by hand-off or around a body of the strategy's.
    """
    settings = spec.experts
    if settings is None or settings.semantics != "return" or settings.backbone != "party":
        raise ConfigurationError(
            "the job's experts are not at parties that answer owners directly (semantics 'return', backbone 'party'); "
            "only such jobs are rehearsed. Set ExpertSettings()."
        )
    if not 0 <= owner < parties:
        raise ConfigurationError(f"owner is {owner}, and there are {parties} parties. Number them from 0.")
    spec = rehearsed(replace(spec, averaging="none"), phase, batch_rows, new_tokens)
    encoded = encode_victims(spec, rows, tokenizer, phase)
    names = [f"party-{index}" for index in range(parties)]
    config = load_config(source, spec.task)
    layers, placement = layers_and_placement(config, spec, names)
    sightings: list[Sighting] = []
    agreement = expert_agreement(spec, config)
    training = phase == Phase.TRAINING
    opened = _open(
        source, spec, agreement, layers, placement, names[owner], sightings, private_tokens, training=training
    )
    with opened as (model, caller):
        written = run_victim(
            model,
            encoded,
            padding_token_id(tokenizer),
            phase,
            batch_rows,
            new_tokens,
            before_batch=caller.begin_batch,
        )
    texts = Truth.of(encoded, tokenizer, texts=written)
    truth = MoeTruth(texts=texts, next_ids=_next_ids(encoded, texts), places=caller.places)
    return MoeRehearsal(sightings=tuple(sightings), truth=truth, placement=placement, spec=spec, owner=names[owner])


class _WatchedCaller(ExpertCaller):
    """An owner's calls that note where in its batch each token that they send stands."""

    places: dict[int, Tensor]
    columns_BT: Tensor
    """Position in its row's text of each token of the batch so far, `NOTHING` for padding."""
    first_row = 0
    done = 0
    """How many of the batch's columns earlier passes had."""

    def begin_batch(self, first_row: int, mask_BT: Tensor) -> None:
        self.first_row, self.done = first_row, 0
        self.columns_BT = torch.where(mask_BT.bool(), mask_BT.long().cumsum(-1) - 1, NOTHING)

    def forward(
        self, layer: int, rows_RD: Tensor, expert_R: Tensor, token_R: Tensor, weight_R: Tensor, *, keep: bool
    ) -> Sequence[Answer]:
        answers = super().forward(layer, rows_RD, expert_R, token_R, weight_R, keep=keep)
        batch = len(self.columns_BT)
        width = (int(token_R.max()) + 1) // batch
        if layer == self._first:
            self.start, self.done = self.done, self.done + width
        for answer in answers:
            flat_U = token_R.cpu()[answer.portion.first_U]
            row_U, column_U = flat_U // width, flat_U % width + self.start
            position_U = self.columns_BT[row_U, column_U]
            self.places[answer.call] = torch.stack([row_U + self.first_row, position_U], dim=-1)
        return answers


@contextmanager
def _open(
    source: ModelSource,
    spec: SplitSpec,
    agreement: Agreement,
    layers: Sequence[str],
    placement: Placement,
    owner: str,
    sightings: list[Sighting],
    private_tokens: PrivateTokens | None,
    *,
    training: bool,
) -> Iterator[tuple[nn.Module, _WatchedCaller]]:
    loaded, channel = load_backbone(source, spec.task, weights=spec.weights, seed=spec.seed, experts=spec.experts)
    model = make_trainable(loaded, None, spec.task, seed=spec.seed).train(training)

    with ExitStack() as stack:
        hub = stack.enter_context(Hub(bind="inproc"))
        session = hub.open_session(list(placement.hosts), agreement, deadline_s=DEADLINE_S, tap=keeping(sightings))
        stack.callback(session.close)
        caller = None
        for name in placement.hosts:
            own = placement.experts_of(name)
            shard = load_experts(source, dict(zip(layers, own, strict=True)), spec.task, weights=spec.weights)
            host = ExpertHost(shard, layers, own, spec, deadline_s=DEADLINE_S)
            host.begin([owner], training=training)
            link = hub.connect(session, name)
            stack.enter_context(link).serve(host)
            if name == owner:
                caller = _WatchedCaller(link, host, placement, spec)
                caller.places = {}
                stack.callback(caller.close)
        assert caller is not None
        stack.enter_context(channel.joined(caller))
        assert spec.experts is not None
        stack.enter_context(route_locally(model, spec.experts, placement, owner, private_tokens))
        yield model, caller


def _next_ids(encoded: Sequence[Encoded], texts: Truth) -> tuple[Tensor, ...]:
    """Return what the loss asks for at each position of a causal model's rows; nothing in other tasks."""
    found = []
    for row, ids in zip(encoded, texts.ids, strict=True):
        asked_T = torch.full_like(ids, NOTHING)
        if isinstance(row, EncodedText) and len(row.labels) == len(ids):
            labels_T = torch.tensor(row.labels)
            asked_T[:-1] = torch.where(labels_T[1:] == IGNORED, NOTHING, labels_T[1:])
        found.append(asked_T)
    return tuple(found)
