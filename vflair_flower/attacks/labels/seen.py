"""What label inferences share: the tail run on an answer that was seen, and guesses made of what is found.

B rows, T tokens, D hidden, C classes, V vocabulary.  Where a whole text has one answer, logits are [B, C] here, of
decoders too; else [B, T, V], and what stands at t answers for the token at t + 1 (causal) or at t (masked).
Invariant: a guess has `NOTHING` where nothing was asked, and never more positions than the row has tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vflair_flower.attacks.guesses import NOTHING, LabelGuess, TextGuess
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.attacks.view import Exchange, SplitView
from vflair_flower.errors import DataError
from vflair_flower.partition import Mode
from vflair_flower.settings import TaskKind, TaskSettings

CLASSIFIES = (TaskKind.SEQUENCE_CLASSIFICATION,)
CLASSIFIES_OR_WRITES = (TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.CAUSAL_LM)


@dataclass(frozen=True, kw_only=True, eq=False)
class TailPass:
    """A forward pass of the tail on an answer that was seen; its graph can be gone through many times, and twice.

    Parameters
    ----------
    answer : Tensor
        A leaf: what the body answered.
    logits : Tensor
        [B, C] or [B, T, V], differentiable in `answer`.  In Head-Tail the answer holds them already.
    """

    answer: Tensor
    logits: Tensor

    def pull(self, logits_grad: Tensor, *, twice: bool = False) -> Tensor:
        """Return the gradient by the answer that a gradient by the logits makes: a linear map.

        Parameters
        ----------
        logits_grad : Tensor
            As the logits.
        twice : bool
            Whether the result shall be differentiable in `logits_grad`.
        """
        (grad,) = torch.autograd.grad(
            self.logits, self.answer, logits_grad, retain_graph=True, create_graph=twice, materialize_grads=True
        )
        return grad


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Compute attention by plain matrix products, of whose backward pass there is a backward pass."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def tail_pass(surrogate: Surrogate, exchange: Exchange) -> TailPass:
    """Run the surrogate's tail on the answer of an exchange; the answer must be there."""
    answer = _answer(exchange).to(surrogate.device).clone().requires_grad_()
    mask_BT = exchange.attention_mask_BT.to(surrogate.device)
    with torch.enable_grad(), twice_differentiable():
        found = answer if surrogate.plan.mode is Mode.HT else surrogate.tail(answer, mask_BT, exchange.position_ids_BT)
        return TailPass(answer=answer, logits=pooled(found, mask_BT, surrogate.task))


def pooled(logits: Tensor, mask_BT: Tensor, task: TaskSettings) -> Tensor:
    """Return logits [B, C] of a model that classifies texts at their last token; all others as they are."""
    if not task.kind.reads_whole_texts or logits.dim() == 2:
        return logits
    return logits[torch.arange(len(logits)), last_tokens(mask_BT)]


def last_tokens(mask_BT: Tensor) -> Tensor:
    """Return the place of each row's last token, int64 [B]."""
    return (mask_BT * torch.arange(mask_BT.shape[1], device=mask_BT.device)).argmax(-1)


def answer_grad(exchange: Exchange) -> Tensor:
    """Return the gradient of the answer; raise DataError where nothing was trained."""
    if exchange.answer_grad is None:
        raise DataError(
            "the view holds a batch without the gradient of its answer, and this attack reads labels from it. Record a "
            "session that trains."
        )
    return exchange.answer_grad


def row_gradients(view: SplitView) -> list[Tensor]:
    """Return each row's gradient by its own loss, [T, D] of its tokens: a loss is the mean over its batch's rows."""
    rows = []
    for exchange in view.exchanges:
        grad = answer_grad(exchange) * exchange.rows
        grad = grad[:, None] if grad.dim() == 2 else grad
        for row, mask in enumerate(exchange.attention_mask_BT.bool()):
            rows.append(grad[row][mask] if grad.shape[1] == len(mask) else grad[row])
    return rows


def can_be_asked(exchange: Exchange, kind: TaskKind) -> Tensor:
    """Return bool [B, T]: tokens whose logits may enter the loss, so of a causal model all but each row's last."""
    asked_BT = exchange.attention_mask_BT.bool().clone()
    if kind is not TaskKind.MASKED_LM:
        asked_BT[torch.arange(len(asked_BT)), last_tokens(exchange.attention_mask_BT)] = False
    return asked_BT


def guess_of(view: SplitView, found: Sequence[Tensor]) -> LabelGuess | TextGuess:
    """Make a guess of what was found in each exchange.

    Parameters
    ----------
    view : SplitView
        Whose rows the guess is for.
    found : sequence of Tensor
        Int64, for each exchange a class for each row [B], or a token for each position of the logits [B, T].
    """
    if view.task.kind.reads_whole_texts:
        return LabelGuess(labels=torch.cat([one.cpu() for one in found]))
    rows: list[Tensor] = []
    for exchange, tokens_BT in zip(view.exchanges, found, strict=True):
        placed_BT = tokens_BT.cpu()
        if view.task.kind is not TaskKind.MASKED_LM:
            placed_BT = torch.cat([torch.full_like(placed_BT[:, :1], NOTHING), placed_BT[:, :-1]], dim=1)
        rows += [ids[mask] for ids, mask in zip(placed_BT, exchange.attention_mask_BT.bool(), strict=True)]
    return TextGuess(ids=tuple(rows))


def _answer(exchange: Exchange) -> Tensor:
    if exchange.answer is None:
        raise DataError("the view holds a batch that was never answered, so there is nothing to run the tail on.")
    return exchange.answer
