"""Vocabulary matching with gaps: choose tokens whose states at a layer's experts, after what was found, are those seen.

N tokens of a moment, C candidates for one place, V vocabulary, D hidden, T tokens so far.  Prefixes grow token by token
with a cache; a state depends on what came before in its row, so that a distance of nearly nothing says that all of the
prefix is right, the tokens that nobody saw included.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from vflair_flower.attacks.experts.public import PublicModel
from vflair_flower.attacks.experts.view import HostView, Moment
from vflair_flower.attacks.guesses import NOTHING, TextGuess
from vflair_flower.attacks.inversion.matching import forbid
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.errors import DataError
from vflair_flower.settings import TaskKind

_FIRST_LOOK = 8
"""Candidates that are tried before all others: mostly the token is among them."""
_PER_FILL = 4
"""Candidates that are tried behind each way of filling a gap."""
_PADDING = 24
"""So many padding tokens behind a row are looked at."""
_LOOSE = 2.0
"""Behind a token that matched badly the prefix is not quite right, and so many times its distance counts as found."""


@attack(
    "gapped-vocabulary-matching",
    goal=Goal.TEXT,
    sees=HostView,
    paper="vocabulary matching of 'Hidden No More', ICML 2025, arXiv 2505.18332, and its gapped form of Cascade, arXiv "
    "2507.05228, at the inputs of experts; gaps are filled by the public model's own predictions",
    kinds=(TaskKind.CAUSAL_LM,),
)
def gapped_matching(
    view: HostView,
    knows: Knowledge,
    *,
    seed: int = 0,
    knows_positions: bool = False,
    candidates: int = 48,
    gap: int = 1,
    beam: int = 16,
    tolerance: float = 1e-4,
    exhaustive: bool = False,
) -> TextGuess:
    """Read tokens in their order, row by row, each by the candidate whose state is nearest to the one that was seen.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    knows_positions : bool
        False: the order of tokens is known and nothing else; rows' ends and gaps are found by what matches, and a row
        of the guess is a moment.  True: places and lengths were granted, the view is of one layer, and a row of the
        guess is a text, with a guess at tokens that nobody saw too.
    candidates : int
        C: half of them those whose states, each alone in a row, are nearest to the state that was seen, half what the
        public model predicts next.
    gap, beam : int
        The longest gap that is searched, and how many ways of filling it, likeliest first; where places are known,
        longer ones are filled with what is predicted.
    tolerance : float
        The squared distance, relative to the state's squared length, below which a token counts as found.
    exhaustive : bool
        Whether all of the vocabulary is tried where no candidate counts as found.

    Raises
    ------
    DataError
        Places are wanted and were not granted, or the view is of several layers.
    """
    if knows_positions and (view.granted is None or len(view.layers) > 1):
        raise DataError(
            f"knows_positions is on, and the view, of {len(view.layers)} layers, has "
            f"{'no' if view.granted is None else 'its'} places. Grant them, and take one layer: view.at(0)."
        )
    public = PublicModel(knows.surrogate)
    readers = {}
    for layer in view.layers:
        settings = _Settings(candidates=candidates, gap=gap, beam=beam, tolerance=tolerance, exhaustive=exhaustive)
        readers[layer] = _Reader(public, layer, knows, settings)
    if knows_positions:
        return TextGuess(ids=_read_rows(view, readers[view.layers[0]]))
    found = [_read_moment(view, index, moment, readers[moment.layer]) for index, moment in enumerate(view.moments)]
    return TextGuess(ids=tuple(found))


@dataclass(frozen=True, kw_only=True)
class _Settings:
    candidates: int
    gap: int
    beam: int
    tolerance: float
    exhaustive: bool


@dataclass(frozen=True, kw_only=True)
class _Match:
    """A token, those that fill the gap before it, and the distance."""

    token: int
    distance: float
    fill: tuple[int, ...] = ()


class _Prefix:
    """The tokens of a row so far, with the caches that go on from them."""

    def __init__(self, tokens: tuple[int, ...] = ()) -> None:
        self.tokens = tokens
        self.cache: DynamicCache | None = None
        self.log_probs: Tensor | None = None


class _Reader:
    """Finds tokens at one layer's experts.

    Parameters
    ----------
    public : PublicModel
        What states are computed with.
    layer : int
        Place among the layers with experts.
    knows : Knowledge
        Which tokens are no text.
    settings : _Settings
        Of the attack.
    """

    def __init__(self, public: PublicModel, layer: int, knows: Knowledge, settings: _Settings) -> None:
        self.public, self.layer, self.settings = public, layer, settings
        self.pad_id = knows.pad_id
        self.alone_VD = public.states_of_each(layer)
        self._special = knows.special_ids - {knows.pad_id}

    def likely(self, seen_D: Tensor, count: int) -> Tensor:
        """Return the tokens whose states, each alone in a row, are nearest to one that was seen, nearest first."""
        scores_V = -(self.alone_VD - seen_D).square().sum(-1)
        return forbid(scores_V, self._special).topk(min(count, len(scores_V))).indices.cpu()

    def predicted(self, prefix: _Prefix) -> Tensor:
        """Return the log-probability of each token after a prefix, [V]; all the same at the beginning of a row."""
        if prefix.log_probs is None:
            scores_V = torch.zeros(self.public.vocabulary)
            if prefix.tokens:
                scores_V = self.public.next_log_probs(torch.tensor([prefix.tokens]))[0].cpu()
            prefix.log_probs = forbid(scores_V, self._special | {self.pad_id})
        return prefix.log_probs

    def start(self, seen_D: Tensor) -> _Match:
        """Return the best token for the first of a row."""
        apart_V = _distances(self.alone_VD, seen_D)
        token = int(apart_V.argmin())
        return _Match(token=token, distance=float(apart_V[token]))

    def following(self, prefix: _Prefix, seen_D: Tensor, limit: float) -> _Match:
        """Return the best token right after a prefix; no more candidates are tried once one is nearer than `limit`."""
        if not prefix.tokens:
            return self.start(seen_D)
        half = max(1, self.settings.candidates // 2)
        tried = self.likely(seen_D, max(half, _FIRST_LOOK))
        best = self._best(prefix, tried[:_FIRST_LOOK], seen_D)
        if best.distance < limit:
            return best
        rest = torch.unique(torch.cat([tried[_FIRST_LOOK:], self.predicted(prefix).topk(half).indices]))
        best = min(best, self._best(prefix, rest, seen_D), key=_distance)
        if self.settings.exhaustive and best.distance >= limit:
            best = min(best, self._best(prefix, torch.arange(self.public.vocabulary), seen_D), key=_distance)
        return best

    def behind_gap(self, prefix: _Prefix, seen_D: Tensor, length: int) -> _Match:
        """Return the best token after a prefix and some tokens that nobody saw, with those."""
        fills = self.fills(prefix, length)
        likely = self.likely(seen_D, _PER_FILL)
        rows = torch.tensor([[*prefix.tokens, *fill, int(token)] for fill in fills for token in likely])
        states_BD = self.public.entered(rows, layers=(self.layer,))[self.layer].hidden_BTD[:, -1]
        apart_B = _distances(states_BD, seen_D)
        place = int(apart_B.argmin())
        return _Match(token=int(rows[place, -1]), distance=float(apart_B[place]), fill=fills[place // len(likely)])

    def padding(self, prefix: _Prefix, seen_D: Tensor) -> float:
        """Return how far a state is from that of the nearest of some padding tokens behind a row."""
        ids_1T = torch.tensor([[*prefix.tokens, *[self.pad_id] * _PADDING]])
        mask_1T = torch.ones_like(ids_1T)
        mask_1T[:, len(prefix.tokens) :] = 0
        states_TD = self.public.entered(ids_1T, mask_1T, layers=(self.layer,))[self.layer].hidden_BTD[0]
        return float(_distances(states_TD[len(prefix.tokens) :], seen_D).min())

    def fills(self, prefix: _Prefix, length: int) -> list[tuple[int, ...]]:
        """Return the likeliest ways to go on by some tokens; where more are missing than are searched, one way."""
        beam = self.settings.beam if length <= self.settings.gap else 1
        ways: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for _ in range(length):
            longer = []
            for score, fill in ways:
                going = _Prefix((*prefix.tokens, *fill)) if fill else prefix
                values, tokens = self.predicted(going).topk(min(beam, self.public.vocabulary))
                longer += [(score + float(v), (*fill, int(t))) for v, t in zip(values, tokens, strict=True)]
            ways = sorted(longer, reverse=True)[:beam]
        return [fill for _, fill in ways]

    @torch.no_grad()
    def _best(self, prefix: _Prefix, tokens_C: Tensor, seen_D: Tensor) -> _Match:
        if prefix.cache is None:
            prefix.cache = DynamicCache(config=self.public.config)
            self.public.entered(torch.tensor([prefix.tokens]), layers=(self.layer,), cache=prefix.cache)
        cache = copy.deepcopy(prefix.cache)
        cache.batch_repeat_interleave(len(tokens_C))
        states_CD = self.public.entered(tokens_C.unsqueeze(1), layers=(self.layer,), cache=cache)[self.layer]
        apart_C = _distances(states_CD.hidden_BTD[:, -1], seen_D)
        place = int(apart_C.argmin())
        return _Match(token=int(tokens_C[place]), distance=float(apart_C[place]))


def _distance(match: _Match) -> float:
    return match.distance


def _distances(states_CD: Tensor, seen_D: Tensor) -> Tensor:
    return (states_CD - seen_D).square().sum(-1) / seen_D.square().sum().clamp_min(1e-12)


def _read_moment(view: HostView, index: int, moment: Moment, reader: _Reader) -> Tensor:
    """Read tokens of which the order is known, and not where rows end or what is missing."""
    strict = reader.settings.tolerance
    found_N = torch.full((len(moment.tokens_ND),), NOTHING)
    front, prefix, limit = view.frontier(index), _Prefix(), strict
    while ready := front.ready():
        place, match, fresh = _next(reader, prefix, {place: moment.tokens_ND[place] for place in ready}, limit)
        found_N[place] = match.token
        front.take(place)
        if fresh:
            prefix, limit = _Prefix((match.token,)), strict
        elif match.token != reader.pad_id:  # padding is seen by nothing that comes after
            prefix = _Prefix((*prefix.tokens, *match.fill, match.token))
            limit = max(limit, _LOOSE * match.distance) if match.distance >= strict else limit
    return found_N


def _next(reader: _Reader, prefix: _Prefix, states: dict[int, Tensor], limit: float) -> tuple[int, _Match, bool]:
    """Return which token is next, what it is, and whether it begins a row."""
    strict = reader.settings.tolerance
    tried: list[tuple[int, _Match]] = []
    for place, seen_D in states.items():
        begin = reader.start(seen_D)
        if not prefix.tokens or begin.distance < strict:
            return place, begin, True
        match = reader.following(prefix, seen_D, limit)
        if match.distance < limit:
            return place, match, False
        tried.append((place, match))
    for place, seen_D in states.items():
        if reader.padding(prefix, seen_D) < limit:
            return place, _Match(token=reader.pad_id, distance=0.0), False
    for length in range(1, reader.settings.gap + 1):
        for place, seen_D in states.items():
            match = reader.behind_gap(prefix, seen_D, length)
            if match.distance < limit:
                return place, match, False
            tried.append((place, match))
    place, match = min(tried, key=lambda one: one[1].distance)
    return place, match, False


def _read_rows(view: HostView, reader: _Reader) -> tuple[Tensor, ...]:
    """Read texts of which it is known where the tokens that were seen stand."""
    granted = view.granted
    assert granted is not None
    seen: list[dict[int, Tensor]] = [{} for _ in granted.lengths]
    for moment, place_N2 in zip(view.moments, granted.places, strict=True):
        for (row, position), state_D in zip(place_N2.tolist(), moment.tokens_ND, strict=True):
            if position != NOTHING:
                seen[row][position] = state_D
    return tuple(_read_row(states, length, reader) for states, length in zip(seen, granted.lengths, strict=True))


def _read_row(states: dict[int, Tensor], length: int, reader: _Reader) -> Tensor:
    prefix, limit = _Prefix(), reader.settings.tolerance
    for position in sorted(states):
        missing = position - len(prefix.tokens)
        if missing:
            match = reader.behind_gap(prefix, states[position], missing)
        else:
            match = reader.following(prefix, states[position], limit)
        if match.distance >= limit:
            limit = max(limit, _LOOSE * match.distance)
        prefix = _Prefix((*prefix.tokens, *match.fill, match.token))
    missing = length - len(prefix.tokens)
    fill = reader.fills(prefix, missing)[0] if missing else ()
    return torch.tensor([*prefix.tokens, *fill])
