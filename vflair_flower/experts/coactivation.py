"""Place experts that are often chosen together at one party, so that a token is sent to fewer hosts.

L layers with experts, E experts of each.  Counts [L, E, E]: for how many tokens two experts were chosen both; on the
diagonal, one was chosen at all.  A token of K experts goes to K hosts less the pairs that share one: exactly so for two
experts per token, and at least as a guide for more.
Not here: whose tokens they are; every party's count alike, and padding is counted, for it is sent as well.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import quadratic_assignment
from torch import Tensor, nn
from transformers import PreTrainedModel

from vflair_flower.errors import ConfigurationError, ModelError
from vflair_flower.experts.dispatch import RemoteExperts
from vflair_flower.experts.modules import expert_modules, num_experts
from vflair_flower.experts.placement import shares_of

_STARTS = 4
_MOST_EXCHANGED = 128
"""For more experts of a layer than this, trying all exchanges of two takes minutes."""


def count_coactivation(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Run a model on batches and count which experts are chosen for the same token.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A mixture-of-experts model, whole, or split and inside its session.
    batches : iterable of mapping of str to torch.Tensor
        What the model is called with, each.

    Returns
    -------
    torch.Tensor
        Integer, ``[L, E, E]``, symmetric.

    Raises
    ------
    ModelError
        If the model has no experts.
    """
    whole = expert_modules(model)
    modules = [m for name, m in model.named_modules() if isinstance(m, RemoteExperts) or name in whole]
    if not modules:
        raise ModelError("the model has no experts to count; give a mixture-of-experts model.")
    counts_LEE = torch.zeros(len(modules), num_experts(model.config), num_experts(model.config), dtype=torch.int64)
    handles = [
        module.register_forward_pre_hook(partial(_count, counts_EE=counts_LEE[layer]))
        for layer, module in enumerate(modules)
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return counts_LEE


def place_by_coactivation(
    counts_LEE: Tensor, parties: int, *, capacities: Sequence[float] = ()
) -> tuple[tuple[int, ...], ...]:
    """Group each layer's experts so that as many pairs as can be found of those chosen together are at one party.

    A local search for a quadratic assignment (Vogelstein et al., 2015, then exchanges of two), from the same starts
    every time; the best found is not proven to be the best there is.

    Parameters
    ----------
    counts_LEE : torch.Tensor
        As `count_coactivation` returns it; those of several parties or runs can be added.
    parties : int
        Among how many to share.
    capacities : sequence of float, optional
        What each party can hold, in the order of names, in any unit; alike by default.

    Returns
    -------
    tuple[tuple[int, ...], ...]
        For ``ExpertSettings(placement="table", table=...)``.

    Raises
    ------
    ConfigurationError
        If the counts are of another shape, there are more parties than experts, or capacities do not fit the parties.

    Examples
    --------
    >>> import torch
    >>> counts = torch.tensor([[[9, 0, 5, 0], [0, 9, 0, 5], [5, 0, 9, 0], [0, 5, 0, 9]]])
    >>> table = place_by_coactivation(counts, parties=2)
    >>> table[0][0] == table[0][2] != table[0][1] == table[0][3]
    True
    """
    if counts_LEE.dim() != 3 or counts_LEE.shape[1] != counts_LEE.shape[2]:
        raise ConfigurationError(
            f"counts of shape {tuple(counts_LEE.shape)} are no counts of pairs of experts; give [layers, experts, "
            "experts], as count_coactivation returns them."
        )
    experts = counts_LEE.shape[1]
    if not 1 <= parties <= experts:
        raise ConfigurationError(f"{parties} parties are to share {experts} experts; take 1 to {experts} parties.")
    shares = shares_of(capacities or (1.0,) * parties, parties, experts)
    table = []
    for layer, counts_EE in enumerate(counts_LEE.double().numpy()):
        # Where shares are uneven by chance alone, the larger ones are another party's in each layer.
        turn = 0 if capacities else layer % parties
        sizes = [shares[(party - turn) % parties] for party in range(parties)]
        table.append(tuple(int(party) for party in _grouped(counts_EE, sizes)))
    return tuple(table)


def _grouped(counts_EE: Any, sizes: Sequence[int]) -> Any:
    """Return, for each expert, its group; groups have these sizes."""
    group_E = np.repeat(np.arange(len(sizes)), sizes)
    together_EE = (group_E[:, None] == group_E[None, :]).astype(np.float64)
    pairs_EE = counts_EE - np.diag(np.diag(counts_EE))
    generator = np.random.default_rng(0)
    found = [
        quadratic_assignment(
            pairs_EE, together_EE, method="faq", options={"maximize": True, "rng": generator, "P0": "randomized"}
        )
        for _ in range(_STARTS)
    ]
    best = max(found, key=lambda result: result.fun)
    if len(counts_EE) <= _MOST_EXCHANGED:
        guess = np.stack([np.arange(len(counts_EE)), best.col_ind], axis=1)
        options = {"maximize": True, "rng": generator, "partial_guess": guess}
        best = quadratic_assignment(pairs_EE, together_EE, method="2opt", options=options)
    return group_E[best.col_ind]


def _count(_module: nn.Module, args: tuple[Any, ...], *, counts_EE: Tensor) -> None:
    """Add the choices that experts are called with: hidden, experts [T, K], weights."""
    chosen_TE = torch.zeros(len(args[1]), len(counts_EE), dtype=torch.float64)
    chosen_TE.scatter_(1, args[1].cpu(), 1.0)
    counts_EE += (chosen_TE.T @ chosen_TE).long()
