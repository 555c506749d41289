"""DAGER: texts whose tokens, and whose beginnings, fit the span of the gradient: exact where tokens are fewer than D.

N beginnings of T tokens, D hidden, V vocabulary.  First each token by itself (the input of the first block's
attention), then beginnings of texts, one token longer at a time (the input of a later block's attention).  A host of
experts sees no attention; experts' inputs are told by their own gradients, of the tokens routed to them alone.
Decoders only: in them what follows does not change what came before, so a beginning is told before its end is known.
Of a language model's texts the last token is never seen: it is asked nothing, and no other token looks at it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vflair_flower.attacks.gradients.probes import Probe, attention_probes, expert_probes, far_from
from vflair_flower.attacks.gradients.replay import word_table
from vflair_flower.attacks.gradients.view import GradientView
from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, Phase, attack
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition.structure import family_of, stack_lengths
from vflair_flower.settings import TaskKind

_SAME = 0.7
"""Two texts of which one begins like so much of the other count as one, where rows' lengths are not known."""


@dataclass(frozen=True)
class _Begun:
    """A text as far as it fits, and the mean distance of its tokens."""

    ids: tuple[int, ...]
    far: float
    ends: bool


@attack(
    "dager",
    goal=Goal.TEXT,
    sees=GradientView,
    during=Phase.TRAINING,
    kinds=(TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.SEQUENCE_REGRESSION, TaskKind.CAUSAL_LM),
    paper="Petrov et al., NeurIPS 2024, arXiv 2405.15586; of queries, keys and values, not queries alone, in which a "
    "text's first token is missing; any later block that the view shows; experts' gradients; decoders only",
    causal_only=True,
)
def dager(
    view: GradientView,
    knows: Knowledge,
    *,
    seed: int = 0,
    rank_tolerance: float = 1e-7,
    token_tolerance: float = 0.01,
    prefix_tolerance: float = 0.01,
    beginnings: int = 200,
    batch_rows: int = 1024,
) -> TextGuess:
    """Find the tokens, then the texts, that lie in the span of the gradient.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`; nothing is random here.
    rank_tolerance : float
        Singular values below this part of the largest are rounding.
    token_tolerance, prefix_tolerance : float
        How far from the span, relative to its length, an input may be and still count as in it.
    beginnings : int
        How many are followed at once; of more, those nearest to the span.
    batch_rows : int
        How many texts go through the surrogate at once.

    Raises
    ------
    ConfigurationError
        The model is no decoder, the view has neither attention's nor experts' gradients, or there are so many tokens
        that every text would fit.
    """
    surrogate = knows.surrogate
    config = surrogate.config
    if family_of(config).encoder or len(stack_lengths(config)) > 1:
        raise ConfigurationError(
            f"the model family is {config.get_text_config().model_type!r}, whose tokens all change one another, and "
            "this attack builds texts from their beginning. Use 'lamp', or attack a decoder."
        )
    lengths = view.lengths
    if lengths is not None and surrogate.task.kind.writes:  # a last token is asked nothing, and nobody looks at it
        lengths = tuple(length - 1 for length in lengths)
    words, texts = _probes(view, surrogate, rank_tolerance)
    search = _Search(surrogate, words, texts, token_tolerance, prefix_tolerance, beginnings, batch_rows)
    found = search.run(max(lengths) if lengths else _longest(config))
    chosen = _by_length(found, lengths) if lengths else _most_distinct(found, view.rows)
    ids = tuple(torch.tensor(one, dtype=torch.int64) for one in chosen)
    return TextGuess(ids=ids, aligned=False, matched=False)


def _probes(view: GradientView, surrogate: Surrogate, tolerance: float) -> tuple[Probe | None, list[Probe]]:
    """Return what tells tokens by themselves, if anything does, and what tells beginnings of texts."""
    attention = attention_probes(surrogate.tuned, view, tolerance)
    width, tokens = surrogate.hidden_size, sum(view.lengths or ())
    full = [probe for probe in attention if probe.span is not None and probe.span.is_everything]
    if attention and (tokens >= width or full):
        raise ConfigurationError(
            f"the batch has {tokens or 'as many or more'} tokens in {view.rows} rows, and the model is {width} wide: "
            f"their span is everything, and every text fits. This attack needs fewer than {width} tokens in all; "
            "attack smaller batches or shorter rows."
        )
    if attention and attention[0].block == 0:
        if len(attention) < 2:
            raise ConfigurationError(
                "the view has the gradient of the first block's attention and of no later one's, which tells tokens "
                "and not their order. Give a view with a second block."
            )
        return attention[0], attention[1:2]
    if attention:
        return None, attention[:1]
    experts = expert_probes(surrogate.tuned, view, tolerance)
    if not experts:
        raise ConfigurationError(
            f"none of the {len(view.gradients)} tensors of the view tells this attack anything: it reads the gradients "
            "of attention's query, key and value weights, or those of experts that got fewer tokens than they are "
            "wide. Train all parameters, or attack smaller batches."
        )
    return None, experts


@dataclass
class _Search:
    surrogate: Surrogate
    words: Probe | None
    texts: list[Probe]
    token_tolerance: float
    prefix_tolerance: float
    beginnings: int
    batch_rows: int

    def __post_init__(self) -> None:
        self.vocabulary = len(word_table(self.surrogate.tuned))
        self._tokens: list[Tensor] = []
        self._anywhere = self._placed = False

    def run(self, longest: int) -> list[_Begun]:
        """Return all texts, up to `longest` tokens, that fit as far as they go, shorter ones first."""
        kept: list[_Begun] = []
        alive = [_Begun((), 0.0, False)]
        for position in range(longest):
            tokens = self.tokens_at(position)
            if not len(tokens):
                break
            longer = self._longer(alive, tokens)
            begun = {one.ids[:-1] for one in longer}
            kept += [_Begun(one.ids, one.far, one.ids not in begun) for one in alive if one.ids]
            alive = longer
            if not alive:
                return kept
        return kept + [_Begun(one.ids, one.far, True) for one in alive]

    def tokens_at(self, position: int) -> Tensor:
        """Return the tokens that may stand at a position: the same everywhere where positions are turned (RoPE)."""
        if self.words is None:
            return torch.arange(self.vocabulary)
        while not self._anywhere and len(self._tokens) <= position:
            far_V = self._far([self.words], torch.arange(self.vocabulary)[:, None], first=len(self._tokens))
            self._tokens.append(torch.nonzero(far_V < self.token_tolerance).flatten())
            if len(self._tokens) == 1:
                later_V = self._far([self.words], torch.arange(self.vocabulary)[:, None], first=1)
                self._anywhere = bool(torch.allclose(later_V, far_V, atol=1e-5))
                self._placed = not self._anywhere
        return self._tokens[0 if self._anywhere else position]

    def _longer(self, alive: Sequence[_Begun], tokens: Tensor) -> list[_Begun]:
        """Return every beginning with every token behind it that fits."""
        found: list[_Begun] = []
        for one in alive:
            before_NT = torch.tensor(one.ids, dtype=torch.int64).expand(len(tokens), -1)
            far_N = self._far(self.texts, torch.cat([before_NT, tokens[:, None]], dim=1))
            if len(set(one.ids)) == 1 and not self._placed:
                # Attention to one token is attention to many of it: both have the same inputs, and without end.
                far_N[tokens == one.ids[0]] = float("nan")
            for place in torch.nonzero(far_N < self.prefix_tolerance).flatten().tolist():
                far = (one.far * len(one.ids) + float(far_N[place])) / (len(one.ids) + 1)
                found.append(_Begun((*one.ids, int(tokens[place])), far, False))
        return sorted(found, key=lambda one: one.far)[: self.beginnings]

    def _far(self, probes: Sequence[Probe], ids_NT: Tensor, *, first: int = 0) -> Tensor:
        model: nn.Module = self.surrogate.tuned
        parts = ids_NT.to(self.surrogate.device).split(self.batch_rows)
        return torch.cat([far_from(model, probes, part, first_position=first) for part in parts])


def _by_length(found: Sequence[_Begun], lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Return for each row a text of its length, and if there is none one that goes no further, nearest first."""
    left = sorted(found, key=lambda one: (not one.ends, one.far))
    chosen: dict[int, tuple[int, ...]] = {}
    for fits in (True, False):
        for row, length in enumerate(lengths):
            if row not in chosen:
                usable = [one for one in left if (len(one.ids) == length if fits else one.ends)]
                if usable:
                    chosen[row] = usable[0].ids
                    left.remove(usable[0])
    whole = {len(ids): ids for ids in chosen.values()}  # a text that is there twice is found once
    return [chosen.get(row, whole.get(length, ())) for row, length in enumerate(lengths)]


def _most_distinct(found: Sequence[_Begun], rows: int) -> list[tuple[int, ...]]:
    """Return texts that go no further, nearest first, none that begins like most of another; none for rows without."""
    chosen: list[tuple[int, ...]] = []
    for one in sorted((one for one in found if one.ends), key=lambda one: (len(one.ids) < 2, one.far)):
        if len(chosen) < rows and all(_shared(one.ids, other) < _SAME for other in chosen):
            chosen.append(one.ids)
    return chosen + [()] * (rows - len(chosen))


def _shared(one: Sequence[int], other: Sequence[int]) -> float:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return same / max(1, min(len(one), len(other)))


def _longest(config: object) -> int:
    text = config.get_text_config()  # type: ignore[attr-defined]
    return int(getattr(text, "max_position_embeddings", 0) or 512)
