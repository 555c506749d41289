"""Hand-off, as in the paper (PC-MoE, arXiv 2506.02965): whose expert weighs most runs the next block by its own model.

B batch, T tokens, N = tokens that one party leads, D hidden.  Embedding, the blocks up to the first layer with experts,
final norm, task head and loss are the owner's.  After each layer with experts a lead is chosen: of a sequence, the
party whose experts got the largest sum of router weights over its tokens; or of a token, the host of its heaviest
expert.  The lead runs the blocks up to and with the next layer with experts.  A token's lead needs all earlier tokens
of its sequence: it gets the whole sequence, makes keys and values with its own weights, and returns its tokens alone.
What the paper leaves open, and why it is decided so: docs/decisions/0006-experts.md.
Invariants: hidden states go over the owner, from lead to lead; with equal own models all is the whole model's function.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vflair_flower.errors import ConfigurationError, PartitionError
from vflair_flower.experts.block_calls import BlockCalls, Led, Share
from vflair_flower.experts.blocks import TOKEN, BlockInput, BlockRunner
from vflair_flower.experts.placement import Placement
from vflair_flower.partition.holes import PACKED
from vflair_flower.spec import SplitSpec


def hands_off(spec: SplitSpec) -> bool:
    """Whether a job's tokens are handed to the hosts of their experts."""
    return spec.experts is not None and spec.experts.semantics != "return"


def refuse_hand_off(spec: SplitSpec) -> None:
    """Raise ConfigurationError for a job whose tokens cannot be handed off."""
    if not hands_off(spec):
        return
    assert spec.experts is not None
    if spec.tuning is not None and (spec.tuning.method == "adalora" or spec.tuning.dropout):
        raise ConfigurationError(
            f"semantics is {spec.experts.semantics!r}, the LoRA method {spec.tuning.method!r} and its dropout "
            f"{spec.tuning.dropout:g}. AdaLoRA would choose ranks by gradients that come later, and leads run blocks "
            "in threads in which dropout cannot be repeated. Use 'lora' or 'dora' without dropout."
        )
    if spec.training.gradient_checkpointing:
        raise ConfigurationError(
            f"semantics is {spec.experts.semantics!r} and gradient_checkpointing is set; a block that is computed "
            "again would be handed to its lead again. Set gradient_checkpointing to False."
        )


class HandOff:
    """An owner's passes through its own model and its leads'; join it to the model with `joined`.

    Parameters
    ----------
    runner : BlockRunner
        Of the owner's model.
    calls : BlockCalls
        To leads.
    placement : Placement
        Who hosts what.
    party : str
        The owner.
    take_turn : callable
        Waits until the owner may run its model.  Owners do so one after another: were two at it at once, each might
        wait for the other as its lead.
    """

    def __init__(
        self, runner: BlockRunner, calls: BlockCalls, placement: Placement, party: str, take_turn: Callable[[], None]
    ) -> None:
        self._runner, self._calls, self._take_turn = runner, calls, take_turn
        self._hosts, self._own = placement.hosts, placement.hosts.index(party)
        self._by_token = runner.semantics == TOKEN
        self._mask_BT: Tensor | None = None
        self._positions_BT: Tensor | None = None
        self._lead_BT: Tensor | None = None
        self._ran_here = False
        self.led = [0] * len(self._hosts)
        """Tokens, padding counted, times blocks that each party has led for this owner."""

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Lead the model's passes over the other parties inside the block."""
        self._runner.handed, self._runner.begins = self.block, self.begin
        try:
            yield
        finally:
            self._runner.handed = self._runner.begins = None

    def begin(self, kwargs: dict[str, Any]) -> None:
        """Begin a pass; the model's forward was called with `kwargs`."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise PartitionError(
                f"the attention mask is {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}; a "
                "lead needs one value per token. Pass a mask [B, T]."
            )
        if mask is None and positions is not None and not bool((positions.diff(dim=-1) == 1).all()):
            raise PartitionError(f"the position ids begin anew within a row, and there is no attention mask: {PACKED}")
        self._take_turn()
        self._mask_BT, self._positions_BT, self._lead_BT = mask, positions, None
        self._ran_here = False

    def block(self, index: int, hidden_BTD: Tensor) -> Tensor | None:
        """Return what a block makes of hidden states at their leads; None if this party leads all of them."""
        if self._ran_here:
            chosen = self._runner.chosen(hidden_BTD.shape[:2], self._mask_BT)
            self._follow(None if chosen is None else self._each(chosen, hidden_BTD), hidden_BTD)
        lead_BT = self._lead_BT
        self._ran_here = lead_BT is None or bool((lead_BT == self._own).all())
        if lead_BT is None or self._ran_here:
            self.led[self._own] += hidden_BTD[..., 0].numel()
            return None
        if torch.is_grad_enabled() and not hidden_BTD.requires_grad:  # frozen up to here; leads may have what is not
            hidden_BTD = hidden_BTD.detach().requires_grad_()
        shares = self._shares(lead_BT)
        own = [share for share in shares if share.place == self._own]
        others = [share for share in shares if share.place != self._own]
        pieces: list[Tensor] = []
        leads: list[Tensor | None] = []
        if others:
            answers: list[Led] = []
            pieces.append(_AtLeads.apply(hidden_BTD, self, index, others, answers))  # type: ignore[no-untyped-call]
            leads.extend(answer.lead for answer in answers)
        for share in own:
            output_ND, lead = self._runner.run(index, self._input(hidden_BTD, share))
            pieces.append(output_ND)
            leads.append(lead)
        places = torch.cat([share.places_N() for share in (*others, *own)])
        back = torch.empty_like(places)
        back[places] = torch.arange(len(places))
        named = [self._each(lead, hidden_BTD) for lead in leads if lead is not None]
        if len(named) == len(leads):
            self._follow(torch.cat(named)[back], hidden_BTD)
        out_BTD: Tensor = torch.cat(pieces)[back].view(hidden_BTD.shape)
        return out_BTD

    def _each(self, lead: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Return a lead for each token ``[N]``, of what may be one for each sequence."""
        return lead if self._by_token else lead.repeat_interleave(hidden_BTD.shape[1])

    def _follow(self, lead_N: Tensor | None, hidden_BTD: Tensor) -> None:
        """Let each token be led by whom the layer that was just run has chosen; as before if it chose nobody."""
        if lead_N is None:
            return
        lead_BT = lead_N.view(hidden_BTD.shape[:2])
        if self._by_token and self._mask_BT is not None:  # padding goes where its sequence goes anyway
            mask_BT = self._mask_BT.cpu().bool()
            first_B = mask_BT.int().argmax(-1, keepdim=True)
            lead_BT = torch.where(mask_BT, lead_BT, lead_BT.gather(1, first_B))
        self._lead_BT = lead_BT

    def _shares(self, lead_BT: Tensor) -> list[Share]:
        shares = []
        for place, host in enumerate(self._hosts):
            led_BT = lead_BT == place
            rows_S = torch.nonzero(led_BT.any(-1)).squeeze(-1)
            self.led[place] += int(led_BT.sum())
            if len(rows_S):
                shares.append(Share(place=place, host=host, rows_S=rows_S, led_ST=led_BT[rows_S]))
        return shares

    def _input(self, hidden_BTD: Tensor, share: Share) -> BlockInput:
        rows_S = share.rows_S.to(hidden_BTD.device)
        positions_BT = self._positions_BT
        if positions_BT is not None:
            positions_BT = positions_BT.expand(hidden_BTD.shape[:2])
        return BlockInput(
            hidden_STD=hidden_BTD[rows_S],
            mask_ST=None if self._mask_BT is None else self._mask_BT[rows_S],
            positions_ST=None if positions_BT is None else positions_BT[rows_S],
            led_ST=share.led_ST.to(hidden_BTD.device) if self._by_token else None,
        )

    def _forward(self, hidden_BTD: Tensor, index: int, shares: Sequence[Share], *, keep: bool) -> list[Led]:
        asked = [(share, self._input(hidden_BTD, share)) for share in shares]
        return self._calls.forward(index, asked, keep=keep)


class _AtLeads(torch.autograd.Function):
    """The rows of a block that other parties lead, one lead's after the other's."""

    @staticmethod
    def forward(
        ctx: Any, hidden_BTD: Tensor, owner: HandOff, index: int, shares: Sequence[Share], answers: list[Led]
    ) -> Tensor:
        answers.extend(owner._forward(hidden_BTD, index, shares, keep=ctx.needs_input_grad[0]))
        ctx.calls, ctx.asked = owner._calls, [(s, a.call) for s, a in zip(shares, answers, strict=True)]
        ctx.like = (hidden_BTD.shape, hidden_BTD.device, hidden_BTD.dtype)
        return torch.cat([answer.output_ND for answer in answers])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None, None]:
        shape, device, dtype = ctx.like
        grad_BTD = torch.zeros(shape, device=device, dtype=dtype)
        parts = grad_ND.split([int(share.led_ST.sum()) for share, _ in ctx.asked])
        # One after the other: hosts add up what leads send them, and a sum's last bits depend on the order.
        for (share, call), part_ND in zip(ctx.asked, parts, strict=True):
            back_STD = ctx.calls.backward(share, call, part_ND)
            grad_BTD.index_add_(0, share.rows_S.to(device), back_STD.to(device, dtype))
        return grad_BTD, None, None, None, None
