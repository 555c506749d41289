"""Cut a transformers model: keep the blocks a party owns, leave holes where it does not.

The list of blocks keeps its full length, so block indices, `layer_types[i]`, masks and the names of all parameters
stay those of the whole model; transformers' own forward runs unchanged.  A hole has no parameters.

B batch, T tokens, D hidden, C classes, V vocabulary.  Tensors that cross a cut: `hidden_BTD` there; back come
`hidden_BTD` (Head-Body-Tail) or the task head's output, `[B, C]`, `[B, T, C]` or `[B, T, V]` (Head-Tail).
Invariant: the parties' segments together equal the uncut model, bit for bit in float32 (tests/exact/).
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vflair_flower.errors import PartitionError, SessionClosedError
from vflair_flower.partition.plan import Segment
from vflair_flower.partition.structure import Place, family_of, find_stack, outside_stack, task_head_places


class SegmentCall(Protocol):
    """What a hole calls: differentiable in `hidden_BTD`; see `vflair_flower.remote.RemoteSegment`."""

    def __call__(self, hidden_BTD: Tensor, attention_mask_BT: Tensor, position_ids_BT: Tensor | None) -> Tensor:
        """Run the other party's segment on a hidden state."""


class Channel:
    """Joins the holes of one model: what the forward pass was called with, and where a hole's call goes.

    `call` is set for as long as a session is open; a forward pass without one raises SessionClosedError.
    """

    def __init__(self) -> None:
        self.call: SegmentCall | None = None
        self.attention_mask_BT: Tensor | None = None
        self.position_ids_BT: Tensor | None = None
        self.returned: Tensor | None = None

    def send(self, hidden_BTD: Tensor) -> Tensor:
        """Run the hole: returns what the other party's segment makes of `hidden_BTD`."""
        if self.call is None:
            raise SessionClosedError(
                "the model has a hole where another party's blocks are, and no session is open to call that party. "
                "Use the model inside the session that opened it."
            )
        mask_BT = self.attention_mask_BT
        if mask_BT is None:
            mask_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.int64, device=hidden_BTD.device)
        if not isinstance(mask_BT, Tensor) or mask_BT.shape != hidden_BTD.shape[:2]:
            shape = tuple(mask_BT.shape) if isinstance(mask_BT, Tensor) else type(mask_BT).__name__
            raise PartitionError(
                f"the attention mask is {shape}, but the hidden state at the cut is {tuple(hidden_BTD.shape)}; the "
                "other party needs one mask value per token. Pass a mask [B, T] over all tokens, and to `generate` "
                "use_cache=False: no cache goes across a cut."
            )
        return self.call(hidden_BTD, mask_BT, self.position_ids_BT)


class PassThrough(nn.Module):
    """Stands where a block that this party does not own was, and keeps its index free."""

    def __init__(self, block_returns: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.block_returns = block_returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden state as a block of the family would."""
        return self.block_returns(_hidden(args, kwargs))


class RemoteBlock(PassThrough):
    """The hole at the first block that is not owned: calls the other party.

    In Head-Tail the answer is not a hidden state but the task head's output: it is kept for `RemoteHead`, and what
    runs in between runs on parameter-free stubs whose result nobody reads.
    """

    def __init__(self, block_returns: Callable[[Tensor], Any], channel: Channel, *, keep_for_head: bool) -> None:
        super().__init__(block_returns)
        self.channel = channel
        self.keep_for_head = keep_for_head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Send the hidden state, return what comes back."""
        hidden_BTD = _hidden(args, kwargs)
        returned = self.channel.send(hidden_BTD)
        if self.keep_for_head:
            self.channel.returned = returned
            return self.block_returns(hidden_BTD.detach())
        return self.block_returns(returned)


class RemoteHead(nn.Module):
    """Stands where the task head was (Head-Tail): hands on what the model party's task head returned."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self.channel = channel

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

    def forward(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return zeros of the embedding's shape."""
        return torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)


class FirstToken(nn.Module):
    """Stands where a pooler was: same shape out, no parameters."""

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the first position, ``[B, D]``."""
        return hidden_BTD[:, 0]


def cut(model: PreTrainedModel, segment: Segment) -> Channel:
    """Drop from `model`, in place, all that `segment` does not own.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A task model (``AutoModelForSequenceClassification`` and the like), of any device, the meta device too.
    segment : Segment
        What is to stay.

    Returns
    -------
    Channel
        Joins the holes; set its `call` when a session opens.  For a whole model it is never used.

    Raises
    ------
    ModelError
        If the family is unknown or the blocks cannot be found.
    """
    base = model.base_model
    returns = family_of(model.config).block_returns
    stack_name, stack = find_stack(model)
    channel = Channel()
    for index in range(len(stack)):
        if index not in segment.blocks:
            stack[index] = PassThrough(returns)
    gap = segment.gap
    starts_here = segment.embedding and gap is not None
    if segment.embedding and gap is not None:
        stack[gap] = RemoteBlock(returns, channel, keep_for_head=not segment.task_head)
        base.register_forward_pre_hook(lambda _m, _args, kwargs: _remember(channel, kwargs), with_kwargs=True)
    before, after = outside_stack(base, stack_name)
    if not segment.embedding:
        _empty_embedding(model, before, keep_tied=segment.task_head and _is_tied(model))
    if not segment.task_head:
        _empty_task_head(model, after, RemoteHead(channel) if starts_here else nn.Identity())
    return channel


def _empty_embedding(model: PreTrainedModel, before: list[Place], *, keep_tied: bool) -> None:
    for place in before:
        if isinstance(place.module, nn.Embedding):
            if not (keep_tied and place.module is model.get_input_embeddings()):
                place.replace(NullEmbedding(place.module.embedding_dim, place.module.weight.dtype))
        elif place.has_own_parameters:
            place.replace(nn.Identity())


def _empty_task_head(model: PreTrainedModel, after: list[Place], stand_in: nn.Module) -> None:
    pooler = getattr(model.base_model, "pooler", None)
    for place in after:
        if place.module is pooler:
            place.replace(FirstToken())
        elif place.has_own_parameters:
            place.replace(nn.Identity())
    heads = task_head_places(model)
    for place in heads:
        place.replace(stand_in if place is heads[-1] else nn.Identity())


class SegmentRunner:
    """Runs a segment that does not begin with the embedding: a hidden state in, hidden state or logits out.

    The forward pass is transformers' own; the hidden state enters at the first owned block by a pre-hook, and is read
    after the last one (or after the task head, if owned).  One forward at a time: the hooks hold the state.
    """

    def __init__(self, model: PreTrainedModel, segment: Segment) -> None:
        self._model = model
        self._segment = segment
        self._lock = threading.Lock()
        self._entering: Tensor | None = None
        self._leaving: Tensor | None = None
        _, stack = find_stack(model)
        stack[segment.blocks[0]].register_forward_pre_hook(self._enter, with_kwargs=True)
        last = task_head_places(model)[-1].module if segment.task_head else stack[segment.blocks[-1]]
        last.register_forward_hook(self._leave)

    def __call__(
        self,
        hidden_BTD: Tensor,
        attention_mask_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        *,
        within: AbstractContextManager[object] | None = None,
    ) -> Tensor:
        """Run the segment; `within` is entered for the forward pass while no other one runs.

        Parameters
        ----------
        hidden_BTD : torch.Tensor
            Float, ``[B, T, D]``.
        attention_mask_BT : torch.Tensor
            Integer, ``[B, T]``, 1 for tokens and 0 for padding.
        position_ids_BT : torch.Tensor, optional
            Integer, ``[B, T]``; computed by the model when absent.

        Returns
        -------
        torch.Tensor
            Hidden states ``[B, T, D]``, or the task head's output if this segment owns it.
        """
        mask_BT = attention_mask_BT.to(device=hidden_BTD.device, dtype=torch.int64)
        inputs: dict[str, Any] = {"attention_mask": mask_BT, "input_ids": self._surrogate_ids(mask_BT)}
        if position_ids_BT is not None:
            inputs["position_ids"] = position_ids_BT.to(device=hidden_BTD.device, dtype=torch.int64)
        run = self._model if self._segment.task_head else self._model.base_model
        with self._lock, within or nullcontext():
            self._entering = hidden_BTD
            try:
                run(**inputs)
                leaving = self._leaving
            finally:
                self._entering = self._leaving = None
        assert leaving is not None
        return leaving

    def _surrogate_ids(self, mask_BT: Tensor) -> Tensor:
        """Ids that say nothing but where padding is: the model's own forward wants some."""
        pad = self._model.config.get_text_config().pad_token_id or 0
        return torch.where(mask_BT.bool(), 1 if pad == 0 else 0, pad)

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden_BTD, self._entering = self._entering, None
        if hidden_BTD is None:
            return None
        return ((hidden_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BTD})

    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._leaving = output[0] if isinstance(output, tuple) else output


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden_BTD


def _remember(channel: Channel, kwargs: dict[str, Any]) -> None:
    channel.attention_mask_BT = kwargs.get("attention_mask")
    channel.position_ids_BT = kwargs.get("position_ids")


def _is_tied(model: PreTrainedModel) -> bool:
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return tied and model.get_output_embeddings() is not None
