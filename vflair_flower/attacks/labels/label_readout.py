"""Label readout: the gradient of the last hidden state points from the label's row of the head to the expected one.

B rows, T tokens, D hidden, C classes, V vocabulary.  Before the final norm the gradient at a token is
u = J W^T (p - y) / N, J nearly gamma / r.  In its plainest form (``expected="mean"``) the label is the v whose
gamma * (W_v - mean W) points against u most: no residual stream, no p and no N are needed.  With
``expected="model"``, p and J are those that the surrogate gives for the answer that was seen.  Nothing is optimised.

With blocks in the tail, attention mixes the gradients of a causal model's tokens, but only towards earlier ones.  They
are peeled off from the last: its gradient is its own label's alone, sent through the derivative of the tail's blocks at
that token, [D, D]; what it makes at earlier tokens is taken away, and so on.  That needs T D backward passes through
the tail.  Where a text has one class of a few, each class's gradient through the tail is made and compared.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from vflair_flower.attacks.guesses import NOTHING, LabelGuess, TextGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.labels.seen import (
    CLASSIFIES_OR_WRITES,
    TailPass,
    answer_grad,
    can_be_asked,
    guess_of,
    tail_pass,
)
from vflair_flower.attacks.registry import Goal, Phase, attack
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.attacks.view import Exchange, SplitView
from vflair_flower.partition import Mode
from vflair_flower.partition.structure import find_stacks, outside_stack, text_model
from vflair_flower.settings import one_of

EXPECTED = ("model", "mean")
"""Where the expected row of the head comes from: the surrogate's prediction, or the mean over the vocabulary."""
_NOISE = 1e-4
_PASSES_AT_ONCE = 64


@attack(
    "label-readout",
    goal=Goal.LABELS,
    sees=SplitView,
    paper="our own; the linear form of cut-layer gradient matching (BiSR, arXiv 2409.00960)",
    during=Phase.TRAINING,
    modes=(Mode.HBT,),
    kinds=CLASSIFIES_OR_WRITES,
)
def label_readout(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    expected: str = "model",
    peel: bool = True,
    least_cosine: float = 0.5,
) -> LabelGuess | TextGuess:
    """Read labels off the gradient of the answer, in closed form.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    expected : {"model", "mean"}
        Of a language model, what the label's row of the head is held against; see the module.
    peel : bool
        Whether a language model's gradients are peeled off where the tail has blocks; else they are read as they came.
    least_cosine : float
        Of gradients that are peeled off: less alike than this, the best label counts as none.
    """
    one_of("expected", expected, EXPECTED)
    if view.task.kind.reads_whole_texts:
        return guess_of(view, [_classes(knows.surrogate, exchange) for exchange in view.exchanges])
    peels = peel and view.plan.tail_blocks > 0
    found = []
    for exchange in view.exchanges:
        readout = _Readout.of(knows.surrogate, exchange, expected)
        found.append(readout.peel(least_cosine) if peels else readout.plain())
    return guess_of(view, found)


def _classes(surrogate: Surrogate, exchange: Exchange) -> Tensor:
    """Return the class of each row whose own gradient points as the one that was seen, int64 [B]."""
    run = tail_pass(surrogate, exchange)
    seen_BM = normalize(answer_grad(exchange).to(surrogate.device).flatten(1), dim=-1)
    columns_CBM = class_gradients(run).flatten(2)
    expected_BM = torch.einsum("bc,cbm->bm", run.logits.detach().softmax(-1), columns_CBM)
    cosines_CB = (normalize(expected_BM - columns_CBM, dim=-1) * seen_BM).sum(-1)
    return cosines_CB.argmax(0)


def class_gradients(run: TailPass) -> Tensor:
    """Return what a gradient of 1 on each class's logit makes at the answer, [C, *answer]."""
    classes = run.logits.shape[-1]
    ones = torch.eye(classes, device=run.logits.device)
    return torch.stack([run.pull(ones[c].expand_as(run.logits)) for c in range(classes)])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Readout:
    """A batch of a causal model, and what of its tail the readout needs.

    Parameters
    ----------
    grad_BTD : Tensor
        The gradient of the answer.
    asked_BT : Tensor
        Bool, where it may have a label.
    answer_BTD, last_BTD : Tensor
        The answer, and what the tail's last block makes of it, differentiable in it.
    expected_BTD : Tensor
        The expected row of the head.
    table_VD, gamma_D : Tensor
        The head, and the final norm's scale.
    across_BTKD : Tensor
        K unit vectors at right angles to all that comes out of the final norm's derivative; K is 0 if not known.
    """

    grad_BTD: Tensor
    asked_BT: Tensor
    answer_BTD: Tensor
    last_BTD: Tensor
    expected_BTD: Tensor
    table_VD: Tensor
    gamma_D: Tensor
    across_BTKD: Tensor

    @classmethod
    def of(cls, surrogate: Surrogate, exchange: Exchange, expected: str) -> "_Readout":
        model = cast("PreTrainedModel", surrogate.tail_model)
        table_VD = cast("Tensor", cast("nn.Module", model.get_output_embeddings()).weight).detach()
        found: list[Tensor] = []

        def look(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        hook = find_stacks(model)[-1].blocks[-1].register_forward_hook(look)
        try:
            run = tail_pass(surrogate, exchange)
        finally:
            hook.remove()
        norm, last_BTD = _final_norm(model, surrogate.hidden_size), found[-1]
        gamma_D = torch.ones_like(table_VD[0]) if norm is None else cast("Tensor", norm.weight).detach()
        if expected == "mean":
            expected_BTD = table_VD.mean(0).expand_as(last_BTD)
            across_BTKD = last_BTD.new_zeros(*last_BTD.shape[:2], 0, last_BTD.shape[-1])
        else:
            expected_BTD = run.logits.detach().softmax(-1) @ table_VD
            across_BTKD = _across(norm, last_BTD.detach())
        return cls(
            grad_BTD=answer_grad(exchange).to(surrogate.device),
            asked_BT=can_be_asked(exchange, surrogate.task.kind).to(surrogate.device),
            answer_BTD=run.answer,
            last_BTD=last_BTD,
            expected_BTD=expected_BTD,
            table_VD=table_VD,
            gamma_D=gamma_D,
            across_BTKD=across_BTKD,
        )

    def plain(self) -> Tensor:
        """Return the label at each position as if the tail had no blocks, int64 [B, T]."""
        labels_BT = torch.full_like(self.asked_BT, NOTHING, dtype=torch.int64)
        for row, token in (self.asked_BT & (self.grad_BTD.norm(dim=-1) > 0)).nonzero().tolist():
            ways_VD = normalize(self._ways(row, token), dim=-1)
            labels_BT[row, token] = (ways_VD @ self.grad_BTD[row, token]).argmax()
        return labels_BT

    def peel(self, least_cosine: float) -> Tensor:
        """Return the label at each position, from the last to the first, int64 [B, T]."""
        left_BTD = self.grad_BTD.clone()
        labels_BT = torch.full_like(self.asked_BT, NOTHING, dtype=torch.int64)
        for token in reversed(range(self.asked_BT.shape[1])):
            explained_BD = torch.zeros_like(left_BTD[:, token])
            own_BDD = self._own_derivative(token)
            for row in self.asked_BT[:, token].nonzero()[:, 0].tolist():
                seen_D = left_BTD[row, token]
                if float(seen_D.norm()) <= _NOISE * float(self.grad_BTD[row].norm(dim=-1).max()):
                    continue
                ways_VD = self._ways(row, token)
                made_VD = ways_VD @ own_BDD[row]
                cosines_V = normalize(made_VD, dim=-1) @ normalize(seen_D, dim=-1)
                best = int(cosines_V.argmax())
                if float(cosines_V[best]) < least_cosine:
                    continue
                labels_BT[row, token] = best
                share = (made_VD[best] @ seen_D) / made_VD[best].square().sum()
                explained_BD[row] = share * ways_VD[best]
            whole_BTD = torch.zeros_like(left_BTD)
            whole_BTD[:, token] = explained_BD
            left_BTD -= self._pull(whole_BTD)
        return labels_BT

    def _ways(self, row: int, token: int) -> Tensor:
        """Return where the gradient before the final norm points for each label, [V, D]."""
        ways_VD = (self.expected_BTD[row, token] - self.table_VD) * self.gamma_D
        for across_D in self.across_BTKD[row, token]:
            ways_VD = ways_VD - (ways_VD @ across_D)[:, None] * across_D
        return ways_VD

    def _own_derivative(self, token: int) -> Tensor:
        """Return for each row, [B, D, D], what a gradient by a token's last state makes at the answer's same token."""
        size = self.last_BTD.shape[-1]
        units = self.last_BTD.new_zeros(size, *self.last_BTD.shape)
        units[torch.arange(size), :, token, torch.arange(size)] = 1.0
        made = []
        for some in units.split(_PASSES_AT_ONCE):
            (pulled,) = torch.autograd.grad(
                self.last_BTD, self.answer_BTD, some, retain_graph=True, is_grads_batched=True
            )
            made.append(pulled[:, :, token])
        return torch.cat(made).transpose(0, 1)

    def _pull(self, grad_BTD: Tensor) -> Tensor:
        (pulled,) = torch.autograd.grad(self.last_BTD, self.answer_BTD, grad_BTD, retain_graph=True)
        return pulled


def _final_norm(model: PreTrainedModel, size: int) -> nn.Module | None:
    """Return the norm between the last block and the head, if there is one."""
    for place in outside_stack(text_model(model), find_stacks(model)[-1].name)[1]:
        weight = getattr(place.module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (size,):
            return place.module
    return None


def _across(norm: nn.Module | None, last_BTD: Tensor) -> Tensor:
    """Return the directions that a norm's derivative takes away, [B, T, K, D]."""
    if norm is None:
        return last_BTD.new_zeros(*last_BTD.shape[:2], 0, last_BTD.shape[-1])
    if not isinstance(norm, nn.LayerNorm):
        return normalize(last_BTD, dim=-1)[:, :, None]
    centred_BTD = last_BTD - last_BTD.mean(-1, keepdim=True)
    return torch.stack([normalize(torch.ones_like(last_BTD), dim=-1), normalize(centred_BTD, dim=-1)], dim=2)
