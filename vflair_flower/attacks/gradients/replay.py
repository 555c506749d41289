"""What an optimisation looks for: dummy texts whose gradient, on the surrogate, is the one that was seen.

B rows, T tokens of the longest, D hidden, C classes.  Rows of one length go through the model together, so there is no
padding to get wrong.  The table of words is left out: embeddings that are no words have no gradient there.
Invariant: the surrogate's own parameters get no gradient and do not change.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import log_softmax, one_hot
from transformers import PreTrainedModel

from vflair_flower.attacks.gradients.view import GradientView
from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import TaskKind

KINDS = (TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.SEQUENCE_REGRESSION)
"""Tasks whose loss can be computed of embeddings; a language model's asks for the very tokens that are unknown."""


class Replay:
    """The surrogate's gradient at dummy texts, next to the one that was seen.

    Parameters
    ----------
    view : GradientView
        What was seen.
    knows : Knowledge
        Its surrogate is a copy of the model; begin and end of its auxiliary texts are taken for those of all texts.

    Raises
    ------
    ConfigurationError
        The task is another, lengths are not known, or the view's parameters are not the surrogate's.
    """

    def __init__(self, view: GradientView, knows: Knowledge) -> None:
        surrogate = knows.surrogate
        self.task, self.device = surrogate.task, surrogate.device
        if self.task.kind not in KINDS:
            raise ConfigurationError(
                f"the task is {self.task.kind.value!r}, whose labels are the unknown tokens; this attack looks for "
                "embeddings under known labels. Use 'dager', or a task of whole texts."
            )
        if view.lengths is None:
            raise ConfigurationError(
                "the rows' lengths are not known, and this attack looks for one embedding per token. Use 'dager'."
            )
        self.model: Any = surrogate.tuned
        self.lengths, self.rows = view.lengths, view.rows
        own = dict(self.model.named_parameters())
        table = word_table(surrogate.tuned)
        self.table_VD = table.detach()
        words = {name for name, p in own.items() if p is table}
        odd = [name for name in view.gradients if name not in own]
        self.names = [name for name in own if name in view.gradients and name not in words]
        self.experts = view.experts
        self.target = [view.gradients[name].to(self.device) for name in self.names]
        odd += [n for n, g in zip(self.names, self.target, strict=True) if self._cut(n, own[n]).shape != g.shape]
        if odd or not self.names:
            raise ConfigurationError(
                f"{len(odd)} of {len(view.gradients)} parameters of the view are not the surrogate's"
                f"{', the first is ' + repr(odd[0]) if odd else ', besides the table of words'}. Give the surrogate "
                "the victim's model, task and tuning."
            )
        self.labels = None if view.labels is None else self._as_targets(view.labels.to(self.device))
        self._parameters = {name: own[name].detach().requires_grad_() for name in self.names}
        self.ids_BT, self.pinned_BT = _frame(knows, self.lengths)

    @property
    def classes(self) -> int:
        """C, or 1 for a number."""
        return len(self.task.label_names) or 1

    def targets(self, scores_BC: Tensor | None) -> Tensor:
        """Return what the dummies are labelled: as known, else the classes that `scores_BC` stand for."""
        if self.labels is not None:
            return self.labels
        assert scores_BC is not None
        return scores_BC if self.task.kind is TaskKind.SEQUENCE_REGRESSION else scores_BC.softmax(-1)

    def framed(self, embeds_BTD: Tensor) -> Tensor:
        """Return embeddings with those of known special tokens in their places."""
        return torch.where(self.pinned_BT.unsqueeze(-1), self.table_VD[self.ids_BT], embeds_BTD)

    def gradients(self, embeds_BTD: Tensor, targets_BC: Tensor, *, differentiable: bool = True) -> list[Tensor]:
        """Return the gradient of the mean loss, in the order of `names`.

        Parameters
        ----------
        embeds_BTD : Tensor
            Embeddings; what lies behind a row's length is not read.
        targets_BC : Tensor
            See `targets`.
        differentiable : bool
            Whether the gradient can be differentiated by the embeddings.
        """
        framed_BTD = self.framed(embeds_BTD)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
            loss: Tensor = embeds_BTD.new_zeros(())
            for length in sorted(set(self.lengths)):
                rows = [row for row, other in enumerate(self.lengths) if other == length]
                inputs = {"inputs_embeds": framed_BTD[rows, :length]}
                logits_BC = functional_call(self.model, self._parameters, (), inputs).logits
                loss = loss + self._losses(logits_BC, targets_BC[rows]).sum() / self.rows
            wanted = list(self._parameters.values())
            found = torch.autograd.grad(loss, wanted, create_graph=differentiable, allow_unused=True)
        parts = zip(self.names, wanted, found, strict=True)
        return [self._cut(name, torch.zeros_like(p) if g is None else g) for name, p, g in parts]

    def nearest(self, embeds_BTD: Tensor, banned: frozenset[int]) -> Tensor:
        """Return the tokens whose embeddings point the same way most, int64 [B, T]; special ones where they belong."""
        unit_VD = nn.functional.normalize(self.table_VD, dim=-1)
        scores_BTV = nn.functional.normalize(embeds_BTD.detach(), dim=-1) @ unit_VD.T
        if banned:
            scores_BTV.index_fill_(-1, torch.tensor(sorted(banned), device=scores_BTV.device), float("-inf"))
        return torch.where(self.pinned_BT, self.ids_BT, scores_BTV.argmax(-1))

    def texts(self, ids_BT: Tensor) -> tuple[Tensor, ...]:
        """Return each row's tokens without what lies behind its length."""
        return tuple(ids[:length].cpu() for ids, length in zip(ids_BT, self.lengths, strict=True))

    def _losses(self, logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
        if self.task.kind is TaskKind.SEQUENCE_REGRESSION:
            return (logits_BC - targets_BC).square().mean(-1)
        return -(targets_BC * log_softmax(logits_BC, -1)).sum(-1)

    def _as_targets(self, labels_B: Tensor) -> Tensor:
        if self.task.kind is TaskKind.SEQUENCE_REGRESSION:
            return labels_B.float().unsqueeze(-1)
        return one_hot(labels_B.long(), self.classes).float()

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        held = self.experts.get(name)
        return tensor if held is None else tensor[list(held)]


def word_table(model: nn.Module) -> Tensor:
    """Return a model's table of word embeddings, [V, D]."""
    table: Tensor = cast("PreTrainedModel", model).get_input_embeddings().weight  # type: ignore[assignment]
    return table


def guess_of(replay: Replay, embeds_BTD: Tensor, knows: Knowledge) -> TextGuess:
    """Return the tokens that embeddings stand for; which row is which, a gradient tells where there is one alone."""
    ids = replay.texts(replay.nearest(embeds_BTD, knows.special_ids))
    return TextGuess(ids=ids, aligned=replay.rows == 1, matched=replay.rows == 1)


def frame_of(knows: Knowledge) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens that all auxiliary texts begin with, and those that they end with."""
    texts: list[Sequence[int]] = [row.input_ids for row in knows.auxiliary]
    if not texts:
        return (), ()
    begin = _common(texts, knows.special_ids)
    end = _common([text[len(begin) :][::-1] for text in texts], knows.special_ids)[::-1]
    return begin, end


def _common(texts: Sequence[Sequence[int]], special: frozenset[int]) -> tuple[int, ...]:
    shared: list[int] = []
    for tokens in zip(*texts, strict=False):
        if len(set(tokens)) > 1 or tokens[0] not in special:
            break
        shared.append(tokens[0])
    return tuple(shared)


def _frame(knows: Knowledge, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return ids [B, T] of known special tokens and of padding, and a mask of where they are."""
    begin, end = frame_of(knows)
    ids_BT = torch.full((len(lengths), max(lengths)), knows.pad_id)
    pinned_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    for row, length in enumerate(lengths):
        pinned_BT[row, :length] = False
        if length >= len(begin) + len(end):
            ids_BT[row, : len(begin)] = torch.tensor(begin, dtype=torch.int64)
            ids_BT[row, length - len(end) : length] = torch.tensor(end, dtype=torch.int64)
            pinned_BT[row, : len(begin)] = True
            pinned_BT[row, length - len(end) : length] = True
    return ids_BT.to(knows.surrogate.device), pinned_BT.to(knows.surrogate.device)
