"""The data party's end of a cut: a call to another party's segment that autograd can go through.

B batch, T tokens, D hidden.  `hidden_BTD` goes there; back come hidden states or logits.  In the backward pass the
gradient of what came back goes there and the gradient of `hidden_BTD` comes back.
Invariant: a forward call that nobody will differentiate leaves nothing behind at the other party.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vflair_flower.errors import SessionError
from vflair_flower.remote import protocol
from vflair_flower.session import Link
from vflair_flower.spec import WIRE_DTYPES, SplitSpec


class RemoteSegment:
    """Calls the model party's segment; put it into a model's `Channel.call`.

    Parameters
    ----------
    link : Link
        An open link; every call has its deadline.
    spec : SplitSpec
        The job; gives the wire's dtype.
    target : str
        The party that holds the segment.
    """

    def __init__(self, link: Link, spec: SplitSpec, target: str = protocol.MODEL_PARTY) -> None:
        self._link = link
        self._target = target
        self._wire = WIRE_DTYPES[spec.wire_dtype]
        self._answer = protocol.returned_name(spec.plan.mode)
        self._calls = itertools.count()
        self.rows_since_step = 0
        """Rows that went through a differentiable forward call since the last step."""
        self.tokens = 0
        """Tokens, padding not counted, that went through forward calls so far."""

    def __call__(self, hidden_BTD: Tensor, attention_mask_BT: Tensor, position_ids_BT: Tensor | None) -> Tensor:
        """Run the other party's segment; differentiable in `hidden_BTD`."""
        differentiable = torch.is_grad_enabled()
        wants_grad = hidden_BTD.requires_grad
        if differentiable and not wants_grad:
            # Nothing before the cut is trained. Autograd would never come back here, and the other party's
            # segment would silently get no gradient: give it a leaf to come back for.
            hidden_BTD = hidden_BTD.detach().requires_grad_()
        if differentiable:
            self.rows_since_step += hidden_BTD.shape[0]
        self.tokens += int(attention_mask_BT.sum())
        answer: Tensor = _Call.apply(hidden_BTD, attention_mask_BT, position_ids_BT, self, differentiable, wants_grad)  # type: ignore[no-untyped-call]
        return answer

    def step(self, *, step: int, total_steps: int) -> None:
        """Tell the other party that an optimiser step is due; returns when it is done there.

        Parameters
        ----------
        step, total_steps : int
            Place in the job, for the learning rate; a total of 0 keeps the rate constant.

        Raises
        ------
        SessionError
            If no differentiable forward call was made since the last step.
        """
        if self.rows_since_step == 0:
            raise SessionError(
                "a step is due, but no rows went through the model since the last one, so the model party has no "
                "gradient. Run the forward and backward pass of a batch before every optimiser step."
            )
        meta: dict[str, Any] = {"rows": self.rows_since_step, "step": step, "total_steps": total_steps}
        self._link.call(self._target, protocol.STEP, {}, meta)
        self.rows_since_step = 0

    def finish(self) -> None:
        """Tell the other party that no more steps come in this session, so that nobody waits for them."""
        self._link.call(self._target, protocol.FINISH, {})

    def _forward(
        self, hidden_BTD: Tensor, mask_BT: Tensor, positions_BT: Tensor | None, keep: bool
    ) -> tuple[int, Tensor]:
        call = next(self._calls)
        tensors = {
            "hidden": hidden_BTD.detach().to("cpu", self._wire),
            "attention_mask": mask_BT.to("cpu", protocol.MASK_DTYPE),
        }
        if positions_BT is not None:
            positions = positions_BT.expand(hidden_BTD.shape[:2])
            tensors["position_ids"] = positions.to("cpu", protocol.POSITION_DTYPE)
        reply = self._link.call(self._target, protocol.FORWARD, tensors, {"call": call, "keep": keep})
        return call, reply.tensors[self._answer].to(hidden_BTD.device, hidden_BTD.dtype)

    def _backward(
        self, call: int, grad: Tensor, like: tuple[torch.device, torch.dtype], wants_grad: bool
    ) -> Tensor | None:
        tensors = {"grad": grad.detach().to("cpu", self._wire)}
        reply = self._link.call(self._target, protocol.BACKWARD, tensors, {"call": call, "wants_grad": wants_grad})
        return reply.tensors["grad"].to(*like) if wants_grad else None


class _Call(torch.autograd.Function):
    """One forward call and, if it comes to that, its backward call."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTD: Tensor,
        mask_BT: Tensor,
        positions_BT: Tensor | None,
        segment: RemoteSegment,
        keep: bool,
        wants_grad: bool,
    ) -> Tensor:
        ctx.segment = segment
        ctx.like = (hidden_BTD.device, hidden_BTD.dtype)
        ctx.wants_grad = wants_grad
        ctx.call, answer = segment._forward(hidden_BTD, mask_BT, positions_BT, keep)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        hidden_grad = ctx.segment._backward(ctx.call, grads[0], ctx.like, ctx.wants_grad)
        return hidden_grad, None, None, None, None, None
