"""What inversions share: how far two hidden states are apart, and which token an embedding is.

B rows, T tokens, D hidden, V vocabulary, K choices.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vflair_flower.settings import one_of

LOSSES = ("mse", "cosine")
"""Losses that have their minimum, and only there, where the hidden states (or their directions) are equal."""


def token_distances(found_BTD: Tensor, seen_BTD: Tensor, loss: str) -> Tensor:
    """Return how far each token's state is from the seen one.

    Parameters
    ----------
    found_BTD, seen_BTD : Tensor
        Float [B, T, D].
    loss : {"mse", "cosine"}
        Squared distance relative to the seen state's squared length, or one minus the cosine.

    Returns
    -------
    Tensor
        Float [B, T], at least 0, and 0 where both are equal; of padding it means nothing.
    """
    one_of("loss", loss, LOSSES)
    if loss == "mse":
        return (found_BTD - seen_BTD).square().sum(-1) / seen_BTD.square().sum(-1).clamp_min(1e-12)
    return 1 - cosine_similarity(found_BTD, seen_BTD, dim=-1)


def row_distances(found_BTD: Tensor, seen_BTD: Tensor, mask_BT: Tensor, loss: str) -> Tensor:
    """Return each row's mean of `token_distances` over its tokens (those where `mask_BT` is 1), float [B]."""
    return (token_distances(found_BTD, seen_BTD, loss) * mask_BT).sum(-1) / mask_BT.sum(-1)


def nearest_tokens(embeds_BTD: Tensor, table_VD: Tensor) -> Tensor:
    """Return the tokens whose embeddings point the same way most, int64 [B, T]."""
    return likely_tokens(embeds_BTD, table_VD, 1)[..., 0]


def likeness(embeds_BTD: Tensor, table_VD: Tensor) -> Tensor:
    """Return the cosines of embeddings and all tokens', [B, T, V]."""
    return normalize(embeds_BTD, dim=-1) @ normalize(table_VD, dim=-1).T


def likely_tokens(embeds_BTD: Tensor, table_VD: Tensor, choices: int) -> Tensor:
    """Return the K tokens whose embeddings point the same way most, the best first, int64 [B, T, K].

    Row by row: the scores of one row fill [T, V] numbers.
    """
    directions_DV = normalize(table_VD, dim=-1).T
    found = [(embeds_TD @ directions_DV).topk(min(choices, len(table_VD)), dim=-1).indices for embeds_TD in embeds_BTD]
    return torch.stack(found)


def forbid(scores_BTV: Tensor, tokens: frozenset[int]) -> Tensor:
    """Return the scores with those of some tokens at minus infinity."""
    if not tokens:
        return scores_BTV
    return scores_BTV.index_fill(-1, torch.tensor(sorted(tokens), device=scores_BTV.device), float("-inf"))
