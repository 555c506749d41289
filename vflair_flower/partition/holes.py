"""Holes: the parameter-free modules that stand in a cut model where another party's blocks are.

B batch, T tokens, S tokens that an encoder has read, D hidden, C classes, V vocabulary.  `hidden_BTD` goes there; back
come `hidden_BTD` (Head-Body-Tail) or the task head's output, `[B, C]`, `[B, T, C]` or `[B, T, V]` (Head-Tail).
Invariant: a hole has no parameters of its own, and calls the other party exactly once per forward pass; a model with an
encoder and a decoder has a hole in each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vflair_flower.errors import PartitionError, SessionClosedError
from vflair_flower.partition.caching import SplitCache
from vflair_flower.partition.structure import Family, Part

PACKED = (
    "rows of several texts, which the blocks here would keep apart and the other party's, which run with a mask, would "
    "not. Give each text a row of its own (in TRL packing=False and padding_free=False), with a mask."
)
"""Why rows of several texts are refused, and what to do."""


@dataclass(kw_only=True)
class EncoderStates:
    """What a decoder's blocks read beside their own hidden state.

    Parameters
    ----------
    hidden_BSD : torch.Tensor
        The encoder's final hidden states.  Who runs a segment on them may put another tensor of the same numbers here,
        which the blocks behind the hole read instead: its gradient then goes the way of the hidden state, through the
        segment, and all parts of the encoder's gradient are summed in the order of the whole model.
    mask_BS : torch.Tensor or None
        Integer, 1 for tokens and 0 for padding; None if the forward pass had none.
    """

    hidden_BSD: Tensor
    mask_BS: Tensor | None


class SegmentCall(Protocol):
    """What a hole calls: differentiable in `hidden_BTD`; see `vflair_flower.remote.RemoteSegment`."""

    def __call__(
        self,
        hidden_BTD: Tensor,
        attention_mask_BT: Tensor | None,
        position_ids_BT: Tensor | None,
        *,
        cache: SplitCache | None = None,
        logits_to_keep: int = 0,
        part: Part = Part.ONLY,
        encoder: EncoderStates | None = None,
    ) -> Tensor:
        """Run the other party's segment on a hidden state.

        With a cache, `hidden_BTD` holds the new tokens alone and the mask covers those in the cache as well; no mask
        means that the forward pass had none.  A model with an encoder and a decoder says which of them is meant, and a
        decoder's call is differentiable in the encoder's states too.
        """


class Channel:
    """Joins the holes of one model: what the forward pass was called with, and where a hole's call goes.

    `call` is set for as long as a session is open (`joined`); a forward pass without one raises SessionClosedError.
    """

    def __init__(self) -> None:
        self.call: SegmentCall | None = None
        self.attention_mask_BT: Tensor | None = None
        self.position_ids_BT: Tensor | None = None
        self.cache: SplitCache | None = None
        self.part = Part.ONLY
        self.encoder: EncoderStates | None = None
        self.logits_to_keep = 0
        self.returned: Tensor | None = None

    @contextmanager
    def joined(self, call: SegmentCall) -> Iterator[None]:
        """Let the hole call another party's segment inside the block; afterwards what it called before."""
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before

    def send(self, hidden_BTD: Tensor) -> Tensor:
        """Run the hole: returns what the other party's segment makes of `hidden_BTD`."""
        if self.call is None:
            raise SessionClosedError(
                "the model has a hole where another party's blocks are, and no session is open to call that party. "
                "Use the model inside the session that opened it."
            )
        mask_BT = self.attention_mask_BT
        num_rows, new_tokens = hidden_BTD.shape[:2]
        expected = (num_rows, new_tokens + (0 if self.cache is None else self.cache.tokens))
        if mask_BT is None and self.cache is None:
            _refuse_packed(self.position_ids_BT)
            mask_BT = torch.ones(expected, dtype=torch.int64, device=hidden_BTD.device)
        if mask_BT is not None and (not isinstance(mask_BT, Tensor) or mask_BT.shape != expected):
            shape = tuple(mask_BT.shape) if isinstance(mask_BT, Tensor) else type(mask_BT).__name__
            raise PartitionError(
                f"the attention mask is {shape}, but the hidden state at the cut is {tuple(hidden_BTD.shape)} and the "
                f"cache holds {expected[1] - new_tokens} tokens; the other party needs one mask value per token. Pass "
                "a mask [B, T] over all tokens."
            )
        more: dict[str, Any] = {}
        if self.cache is not None or self.logits_to_keep:
            more |= {"cache": self.cache, "logits_to_keep": self.logits_to_keep}
        if self.part is not Part.ONLY:
            more |= {"part": self.part, "encoder": self.encoder}
        return self.call(hidden_BTD, mask_BT, self.position_ids_BT, **more)


def _refuse_packed(position_ids_BT: Tensor | None) -> None:
    """Raise PartitionError for rows of several texts: without a mask, transformers keeps them apart by positions."""
    if position_ids_BT is None or position_ids_BT.dim() != 2 or bool((position_ids_BT.diff(dim=-1) == 1).all()):
        return
    raise PartitionError(f"the position ids begin anew within a row, and there is no attention mask: {PACKED}")


class PassThrough(nn.Module):
    """Stands where a block that this party does not own was, and keeps its index free."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def hold(self, path: str, module: nn.Module) -> None:
        """Keep a module of the block that was here under its name: a table that blocks elsewhere in the stack read."""
        put(self, path, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden state as a block of the family would."""
        return self.family.block_returns(_hidden(args, kwargs), args, kwargs)


class RemoteBlock(PassThrough):
    """The hole at the first block that is not owned: calls the other party.

    In Head-Tail the answer is not a hidden state but the task head's output: it is kept for `RemoteHead`, and what
    runs in between runs on parameter-free stubs whose result nobody reads.
    """

    def __init__(self, family: Family, channel: Channel, *, keep_for_head: bool) -> None:
        super().__init__(family)
        self.channel = channel
        self.keep_for_head = keep_for_head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Send the hidden state, return what comes back."""
        hidden = _hidden(args, kwargs)
        returned = self.channel.send(swap_time(hidden, self.family))
        if self.keep_for_head:
            self.channel.returned = returned
            returned = hidden.detach()
        else:
            returned = swap_time(returned, self.family)
        return self.family.block_returns(returned, args, kwargs)


class RemoteHead(nn.Module):
    """Stands where the task head was (Head-Tail): hands on what the model party's task head returned."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self.channel = channel

    @property
    def weight(self) -> Tensor:
        """Stand in for the task head's weight, to whose dtype some models cast."""
        return torch.empty(0)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take none: `tie_weights` of a tied model would leave the embedding here, as if the head were this party's."""

    def __getattr__(self, name: str) -> Any:
        """Say why a part of the task head is missing."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"the task head is at the model party (Head-Tail), so {name!r} of it is not here; only what it answers "
                "is. Take the model's logits, or cut Head-Body-Tail, where the head stays. For TRL's SFTTrainer, which "
                "reads it, there is vflair_flower.clients.sft.LogitsSFTTrainer."
            ) from None

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the other party's output, cut to the positions that the model asks for."""
        returned, self.channel.returned = self.channel.returned, None
        if returned is None:
            raise SessionClosedError("the task head was run without the blocks before it; nothing has come back yet.")
        if hidden.dim() == returned.dim() == 3 and hidden.shape[1] < returned.shape[1]:  # logits_to_keep
            return returned[:, -hidden.shape[1] :]
        return returned


class NullEmbedding(nn.Module):
    """Stands where an embedding was; its zeros are overwritten at the first owned block."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width
        self.dtype = dtype
        self.weight = torch.empty(0)  # some models initialise their embedding's weight by name

    def forward(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return zeros of the embedding's shape."""
        return torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)


class Absent(nn.Identity):
    """Stands where a part of the task head was whose output nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = torch.empty(0), torch.empty(0)  # some models initialise their task head's by name


class FirstToken(nn.Module):
    """Stands where a pooler was: same shape out, no parameters."""

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the first position, ``[B, D]``."""
        return hidden_BTD[:, 0]


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module under a dotted name; what is missing on the way there becomes empty modules."""
    *parents, leaf = path.split(".")
    place = root
    for name in parents:
        if name not in place._modules:
            place.add_module(name, nn.Module())
        place = place.get_submodule(name)
    place.add_module(leaf, module)


def swap_time(hidden: Tensor, family: Family) -> Tensor:
    """Return ``[B, T, D]`` of what a block takes or returns, and the other way round: blocks may want ``[T, B, D]``."""
    return hidden.transpose(0, 1).contiguous() if family.time_first else hidden


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden_BTD
