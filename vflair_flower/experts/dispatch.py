"""The owner's end of remote experts: a module without parameters in every layer, and the calls that it makes.

T tokens of a forward pass, K experts per token, R = T * K rows sorted by expert, U different tokens of one host, D
hidden.  Router, weights and the sum over experts stay with the owner (unless ``combine="host"``), in the very order of
transformers' ``grouped_mm``, so that outputs and all gradients are bit for bit those of the whole model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vflair_flower.errors import SessionClosedError, SessionError
from vflair_flower.experts.padding import Room

_NO_RANK = 1 << 30
"""Comes after every copy's rank."""


@dataclass(frozen=True, kw_only=True)
class Portion:
    """The rows of one layer that go to one host.

    Parameters
    ----------
    layer : int
        Place among the model's layers with experts.
    host : str
        Its name.
    rows_N : torch.Tensor
        Integer: their places among all R rows, ascending.
    expert_N : torch.Tensor
        Integer: their experts, ascending.
    token_N : torch.Tensor
        Integer: which of the U tokens each row is.
    tokens_U : torch.Tensor
        Integer: the places of these tokens among all of the layer's, ascending.
    first_U : torch.Tensor
        Integer: for each token, the place among all R rows of one of its rows.
    rank_N : torch.Tensor
        Integer: how many other copies of the row's expert have an answer that would count before this host's.
    room : Room or None
        To what calls about these rows are filled up.
    """

    layer: int
    host: str
    rows_N: Tensor
    expert_N: Tensor
    token_N: Tensor
    tokens_U: Tensor
    first_U: Tensor
    rank_N: Tensor
    room: Room | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for a portion: `output` [N, D], or [U, D] if the host has combined; None if the host was lost."""

    portion: Portion
    call: int
    output: Tensor | None


class ExpertCalls(Protocol):
    """What the layers of a model call: `vflair_flower.experts.caller.ExpertCaller`."""

    combine: str

    def forward(
        self, layer: int, rows_RD: Tensor, expert_R: Tensor, token_R: Tensor, weight_R: Tensor, *, keep: bool
    ) -> Sequence[Answer]:
        """Run rows, sorted by expert, at their hosts."""

    def backward(
        self, answers: Sequence[Answer], grad_RD: Tensor, weight_R: Tensor
    ) -> Sequence[tuple[Tensor | None, Tensor | None]]:
        """Return, per answer, the gradient of its rows or tokens, and of its weights if the host has combined.

        None for the gradient that a lost host does not give: what it answered counts as a constant.
        """

    def refuse_too_few(self, answered_R: Tensor, token_R: Tensor, layer: int) -> None:
        """Raise PartyLostError where too few of a token's experts have answered."""


@dataclass(kw_only=True)
class Replay:
    """What hosts answered in one run of a block; None until they have."""

    answers: Sequence[Answer] | None = None
    group_N: Tensor | None = None
    """Where hosts see some tokens alone: each token's group (`vflair_flower.experts.token_routing`)."""


class ExpertChannel:
    """Joins the layers of one model to the calls that they make while a session is open."""

    def __init__(self) -> None:
        self.calls: ExpertCalls | None = None
        self.replay: Replay | None = None
        """Set while a block is run that will be, or is, computed again (`vflair_flower.experts.recompute`)."""

    @contextmanager
    def joined(self, calls: ExpertCalls) -> Iterator[None]:
        """Let the layers call hosts inside the block; afterwards what they called before."""
        before, self.calls = self.calls, calls
        try:
            yield
        finally:
            self.calls = before


class RemoteExperts(nn.Module):
    """Stands where a layer's experts were: same call, no parameters.

    Parameters
    ----------
    channel : ExpertChannel
        Of the model.
    layer : int
        Place among the model's layers with experts.
    """

    def __init__(self, channel: ExpertChannel, layer: int) -> None:
        super().__init__()
        self.channel = channel
        self.layer = layer

    def forward(self, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return ``[T, D]``, the weighted sum of the experts' outputs."""
        calls = self.channel.calls
        if calls is None:
            raise SessionClosedError(
                "the model's experts are at other parties, and no session is open to call them. Use the model inside "
                "the session that opened it."
            )
        per_token = expert_TK.shape[1]
        expert_R, order_R = torch.sort(expert_TK.reshape(-1))
        token_R = order_R // per_token
        rows_RD, weight_R = hidden_TD[token_R], weight_TK.reshape(-1)[order_R]
        keep = torch.is_grad_enabled()
        if keep and not rows_RD.requires_grad:  # frozen up to here, and autograd would never come back to the hosts
            rows_RD = rows_RD.detach().requires_grad_()
        replay = self.channel.replay or Replay()
        if replay.answers is None:
            _refuse_again()
            asked = (self.layer, rows_RD.detach(), expert_R, token_R, weight_R.detach().float())
            replay.answers = calls.forward(*asked, keep=keep)
        answers = replay.answers
        answered_R = torch.zeros_like(expert_R, dtype=torch.bool)
        for answer in answers:
            if answer.output is not None:
                answered_R[answer.portion.rows_N] = True
        function = _Combined if calls.combine == "host" else _Weighted
        sums_RD = function.apply(rows_RD, weight_R, calls, answers)  # type: ignore[no-untyped-call]
        if not bool(answered_R.all()):
            calls.refuse_too_few(answered_R, token_R, self.layer)
            sums_RD = sums_RD * _more(weight_R, answered_R, token_R, len(hidden_TD)).unsqueeze(-1)
        back_R = torch.empty_like(order_R)
        back_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        out_TD: Tensor = sums_RD[back_R].view(len(hidden_TD), per_token, -1).sum(1).to(hidden_TD.dtype)
        return out_TD


def _without_numbers(answers: Sequence[Answer]) -> list[Answer]:
    """Return who has answered, without what: the backward pass needs no more, and would keep all numbers twice."""
    return [
        answer if answer.output is None else replace(answer, output=answer.output[:0].clone()) for answer in answers
    ]


def _refuse_again() -> None:
    """Raise SessionError in a backward pass: somebody has let blocks be computed again who does not keep answers."""
    if torch._C._current_graph_task_id() != -1:
        raise SessionError(
            "a block is computed again in the backward pass, and would call the hosts of its experts a second time. "
            "Set gradient_checkpointing in the job's TrainingSettings, which keeps what they answered, and not in a "
            "Trainer's arguments or on the model."
        )


def _more(weight_R: Tensor, answered_R: Tensor, token_R: Tensor, tokens: int) -> Tensor:
    """Return by how much the weights of the experts that answered grow, so that each token's keep their sum."""
    zeros_T = torch.zeros(tokens, dtype=weight_R.dtype, device=weight_R.device)
    whole_T = zeros_T.index_add(0, token_R, weight_R)
    left_T = zeros_T.index_add(0, token_R, weight_R * answered_R)
    some_T = left_T > 0
    return torch.where(some_T, whole_T / torch.where(some_T, left_T, 1.0), 0.0)[token_R]


def _placed(answers: Sequence[Answer], parts: Sequence[Tensor | None], like_RD: Tensor) -> Tensor:
    """Put what came back for portions into the places of its rows; of several copies' answers the first counts."""
    placed_RD, best_R = torch.zeros_like(like_RD), torch.full((len(like_RD),), _NO_RANK)
    for answer, part in zip(answers, parts, strict=True):
        portion = answer.portion
        if part is not None:
            better_N = portion.rank_N < best_R[portion.rows_N]
            best_R[portion.rows_N[better_N]] = portion.rank_N[better_N]
            placed_RD[portion.rows_N[better_N]] = part[better_N].to(placed_RD)
    return placed_RD


class _Weighted(torch.autograd.Function):
    """Rows times weights, whose backward pass asks the hosts for the gradient of what went in."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_R: Tensor, calls: ExpertCalls, answers: Sequence[Answer]) -> Tensor:
        out_RD = _placed(answers, [answer.output for answer in answers], rows_RD)
        ctx.calls, ctx.answers = calls, _without_numbers(answers)
        ctx.save_for_backward(out_RD, weight_R)
        return out_RD * weight_R.unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        out_RD, weight_R = ctx.saved_tensors
        weight_grad_R = (grad_RD * out_RD).sum(-1, keepdim=True).squeeze(-1)
        parts = ctx.calls.backward(ctx.answers, grad_RD, weight_R.float())
        return _placed(ctx.answers, [part for part, _ in parts], out_RD), weight_grad_R, None, None


class _Combined(torch.autograd.Function):
    """As `_Weighted`, with hosts that have weighted and summed their rows by token.

    A host's sum stands in the first of the token's rows at it, and zeros in the others, so that the sum over a token's
    rows is the sum over its hosts.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_R: Tensor, calls: ExpertCalls, answers: Sequence[Answer]) -> Tensor:
        out_RD = torch.zeros_like(rows_RD)
        for answer in answers:
            if answer.output is not None:
                out_RD[answer.portion.first_U] = answer.output.to(out_RD)
        ctx.calls, ctx.answers = calls, _without_numbers(answers)
        ctx.save_for_backward(rows_RD, weight_R)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_RD, weight_R = ctx.saved_tensors
        rows_grad_RD, weight_grad_R = torch.zeros_like(rows_RD), torch.zeros_like(weight_R)
        parts = ctx.calls.backward(ctx.answers, grad_RD, weight_R.float())
        for answer, (part, weight_part) in zip(ctx.answers, parts, strict=True):
            if part is not None:
                rows_grad_RD[answer.portion.first_U] = part.to(rows_grad_RD)
            if weight_part is not None:
                weight_grad_R[answer.portion.rows_N] = weight_part.to(weight_grad_R)
        return rows_grad_RD, weight_grad_R, None, None
