"""Tokens from routing alone: which of a coalition's experts each token was sent to.

N tokens, L layers, E experts of a layer, F features of a token, V vocabulary.  No hidden state is looked at.  Within a
layer, the trace of a token and of its neighbours is seen.  That traces of several layers are of one token is known only
where tokens' places are (`granted`), or where one token comes at a time; a coalition that misses tokens cannot count.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vflair_flower.attacks.experts.public import PublicModel
from vflair_flower.attacks.experts.view import HostView
from vflair_flower.attacks.guesses import NOTHING, TextGuess
from vflair_flower.attacks.inversion.matching import forbid
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.errors import DataError
from vflair_flower.settings import TaskKind
from vflair_flower.tasks import padded_ids

_TEXTS_AT_ONCE = 32


@attack(
    "routing-trace",
    goal=Goal.TEXT,
    sees=HostView,
    paper="the trace inversion of arXiv 2602.04105, with traces masked to a coalition's experts, and a small network "
    "over a window in place of a transformer over a text",
    kinds=(TaskKind.CAUSAL_LM,),
)
def routing_trace(
    view: HostView,
    knows: Knowledge,
    *,
    seed: int = 0,
    link_layers: bool = False,
    window: int = 1,
    width: int = 256,
    epochs: int = 20,
    rate: float = 2e-3,
) -> TextGuess:
    """Train a network on traces of auxiliary texts, masked as this coalition's are, and read every token with it.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`; a row of the guess is a moment.
    link_layers : bool
        Join a token's traces over all layers of the view; needs the tokens' places, and takes each row's positions as
        neighbours.  Else each layer by itself, and as neighbours the tokens that were seen before and after.
    window : int
        How many neighbours on either side.
    width, epochs, rate
        Of the network's hidden layer, passes over the auxiliary texts, and Adam's rate, which falls to 0.

    Raises
    ------
    DataError
        There are no auxiliary texts, or places are wanted that were not granted.
    """
    if not knows.auxiliary:
        raise DataError("there are no auxiliary texts, and the network is trained on some. Give the adversary texts.")
    if link_layers and view.granted is None:
        raise DataError(
            "link_layers is on, and the view's tokens have no places, by which traces of several layers are told to "
            "be of one token. Grant them, or set link_layers to false."
        )
    public = PublicModel(knows.surrogate)
    groups = [view.layers] if link_layers else [(layer,) for layer in view.layers]
    networks = {}
    for layers in groups:
        texts = _auxiliary_traces(public, view, knows, layers, whole=link_layers)
        networks[layers] = _train(texts, public.vocabulary, window=window, width=width, epochs=epochs, rate=rate)
    if link_layers:
        return _read_linked(view, knows, networks[view.layers], public.experts, window)
    found = []
    for moment in view.moments:
        features_NF = _windows(moment.hits(public.experts).float(), window)
        found.append(_best(networks[moment.layer,], features_NF, knows.special_ids))
    return TextGuess(ids=tuple(found))


def _auxiliary_traces(
    public: PublicModel, view: HostView, knows: Knowledge, layers: Sequence[int], *, whole: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each auxiliary text, traces [N, L * E] and tokens [N] of what the coalition would see of it."""
    texts = []
    for start in range(0, len(knows.auxiliary), _TEXTS_AT_ONCE):
        rows = [row.input_ids for row in knows.auxiliary[start : start + _TEXTS_AT_ONCE]]
        ids_BT, mask_BT = padded_ids(rows, pad_token_id=knows.pad_id)
        entered = public.entered(ids_BT, mask_BT, layers=layers)
        traces = []
        for layer in layers:
            expert_BTK = entered[layer].expert_BTK.cpu()
            hits_BTE = torch.zeros(*ids_BT.shape, public.experts).scatter_(-1, expert_BTK, 1.0)
            held_E = torch.zeros(public.experts)
            held_E[list(view.held(layer))] = 1.0
            traces.append(hits_BTE * held_E)
        trace_BTF = torch.cat(traces, dim=-1)
        for trace_TF, ids_T, mask_T in zip(trace_BTF, ids_BT, mask_BT.bool(), strict=True):
            kept_T = mask_T if whole else mask_T & trace_TF.bool().any(-1)
            if bool(kept_T.any()):
                texts.append((trace_TF[kept_T], ids_T[kept_T]))
    return texts


def _train(
    texts: Sequence[tuple[Tensor, Tensor]], vocabulary: int, *, window: int, width: int, epochs: int, rate: float
) -> nn.Module:
    features_NF = torch.cat([_windows(trace_TF, window) for trace_TF, _ in texts])
    ids_N = torch.cat([ids for _, ids in texts])
    network = nn.Sequential(
        nn.Linear(features_NF.shape[1], width), nn.GELU(), nn.Linear(width, width), nn.GELU()
    ).append(nn.Linear(width, vocabulary))
    per_batch = 512
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    steps = epochs * -(-len(ids_N) // per_batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(epochs):
        for places in torch.randperm(len(ids_N)).split(per_batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(features_NF[places]), ids_N[places]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _windows(trace_NF: Tensor, window: int) -> Tensor:
    """Return each token's trace with its neighbours' beside it, zeros where there is none."""
    parts = [trace_NF]
    for step in range(1, window + 1):
        empty = torch.zeros_like(trace_NF)
        before, after = empty.clone(), empty
        before[step:], after[:-step] = trace_NF[:-step], trace_NF[step:]
        parts += [before, after]
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def _best(network: nn.Module, features_NF: Tensor, special_ids: frozenset[int]) -> Tensor:
    return forbid(network(features_NF), special_ids).argmax(-1)


def _read_linked(view: HostView, knows: Knowledge, network: nn.Module, experts: int, window: int) -> TextGuess:
    granted = view.granted
    assert granted is not None
    width = len(view.layers) * experts
    traces = [torch.zeros(length, width) for length in granted.lengths]
    for moment, place_N2 in zip(view.moments, granted.places, strict=True):
        first = view.layers.index(moment.layer) * experts
        for (row, position), hits_E in zip(place_N2.tolist(), moment.hits(experts).float(), strict=True):
            if position != NOTHING:
                traces[row][position, first : first + experts] = hits_E
    rows = [_best(network, _windows(trace_TF, window), knows.special_ids) for trace_TF in traces]
    found = []
    for place_N2 in granted.places:
        ids_N = torch.full((len(place_N2),), NOTHING)
        for index, (row, position) in enumerate(place_N2.tolist()):
            if position != NOTHING:
                ids_N[index] = rows[row][position]
        found.append(ids_N)
    return TextGuess(ids=tuple(found))
