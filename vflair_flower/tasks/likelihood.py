"""How likely a model finds what was asked for, row by row: for perplexities, and for LAMBADA's last word.

B batch, T tokens, V vocabulary.  Natural logarithms.
Invariant: only positions with a label count; padding and prompts never do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vflair_flower.errors import DataError
from vflair_flower.tasks.batches import Batch
from vflair_flower.tasks.encoded import IGNORED


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model gave to the tokens asked of one row.

    Parameters
    ----------
    nll : float
        The sum of their negative log probabilities, in nats.
    tokens : int
        How many they are.
    foreseen : bool
        Whether each of them was the model's first choice, given those before it.
    row_id : str
        The row.
    """

    nll: float
    tokens: int
    foreseen: bool
    row_id: str


def likelihoods(logits_BTV: Tensor, batch: Batch, *, causal: bool = True) -> list[Likelihood]:
    """Return the likelihood of every row's labels.

    Parameters
    ----------
    logits_BTV : Tensor
        [B, T, V], as the model gives them, not shifted.
    batch : Batch
        The batch that was forwarded, with labels [B, T].
    causal : bool
        Whether logits name the next token (``causal-lm``) or the token itself (``masked-lm``, ``seq2seq-lm``).

    Raises
    ------
    DataError
        The shapes do not fit, or a row asks for nothing.
    """
    labels_BT = batch.labels.to(logits_BTV.device)
    if labels_BT.dim() != 2 or logits_BTV.shape[:2] != labels_BT.shape:
        raise DataError(
            f"The logits are {tuple(logits_BTV.shape)} and the labels {tuple(labels_BT.shape)}; likelihoods need one "
            "label per token. Encode the rows for a language model."
        )
    if causal:
        logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
    asked_BT = labels_BT != IGNORED
    targets_BT = labels_BT.masked_fill(~asked_BT, 0)
    log_probs_BTV = torch.log_softmax(logits_BTV.float(), dim=-1)
    nll_BT = -log_probs_BTV.gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1).masked_fill(~asked_BT, 0.0)
    first_BT = (logits_BTV.argmax(-1) == labels_BT) | ~asked_BT
    found = []
    for row_id, nll, tokens, foreseen in zip(
        batch.row_ids, nll_BT.double().sum(1).tolist(), asked_BT.sum(1).tolist(), first_BT.all(1).tolist(), strict=True
    ):
        if tokens == 0:
            raise DataError(f"Row {row_id!r} asks for no token, so it has no likelihood. Encode its response too.")
        found.append(Likelihood(nll=nll, tokens=tokens, foreseen=foreseen, row_id=row_id))
    return found
