"""What inversions share: how far two hidden states are apart, and which token an embedding is.

B rows, T tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vflair_flower.settings import one_of

LOSSES = ("mse", "cosine")
"""Losses that have their minimum, and only there, where the hidden states (or their directions) are equal."""


def row_distances(found_BTD: Tensor, seen_BTD: Tensor, mask_BT: Tensor, loss: str) -> Tensor:
    """Return each row's mean distance over its tokens.

    Parameters
    ----------
    found_BTD, seen_BTD : Tensor
        Float [B, T, D].
    mask_BT : Tensor
        1 for tokens.
    loss : {"mse", "cosine"}
        Squared distance relative to the seen state's squared length, or one minus the cosine.

    Returns
    -------
    Tensor
        Float [B], at least 0, and 0 where both are equal.
    """
    one_of("loss", loss, LOSSES)
    if loss == "mse":
        apart_BT = (found_BTD - seen_BTD).square().sum(-1) / seen_BTD.square().sum(-1).clamp_min(1e-12)
    else:
        apart_BT = 1 - cosine_similarity(found_BTD, seen_BTD, dim=-1)
    return (apart_BT * mask_BT).sum(-1) / mask_BT.sum(-1)


def nearest_tokens(embeds_BTD: Tensor, table_VD: Tensor) -> Tensor:
    """Return the tokens whose embeddings point the same way most, int64 [B, T]."""
    scores_BTV = normalize(embeds_BTD, dim=-1) @ normalize(table_VD, dim=-1).T
    return scores_BTV.argmax(-1)


def forbid(scores_BTV: Tensor, tokens: frozenset[int]) -> Tensor:
    """Return the scores with those of some tokens at minus infinity."""
    if not tokens:
        return scores_BTV
    return scores_BTV.index_fill(-1, torch.tensor(sorted(tokens), device=scores_BTV.device), float("-inf"))
