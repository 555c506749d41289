"""Run a segment that does not begin with the embedding: a hidden state in, hidden state or logits out.

B batch, T tokens, S tokens that an encoder has read, D hidden.  The forward pass is transformers' own, so masks,
positions and rotary angles are computed as in the whole model; only the hidden state comes from elsewhere.
"""

import inspect
import threading
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vflair_flower.errors import PartitionError
from vflair_flower.partition.caching import cache_argument
from vflair_flower.partition.holes import EncoderStates, swap_time
from vflair_flower.partition.plan import Segment
from vflair_flower.partition.structure import Part, family_of, find_stacks, segments_of, task_head_places


class SegmentRunner:
    """Runs a segment that does not begin with the embedding: a hidden state in, hidden state or logits out.

    The forward pass is transformers' own; the hidden state enters before the first owned block by a pre-hook, and is
    read after the last one (or after the task head, if owned).  One forward at a time: the hooks hold the state.  Of a
    model with an encoder and a decoder, a call runs the part that it names.
    """

    def __init__(self, model: PreTrainedModel, segment: Segment) -> None:
        self._model = model
        self._segment = segment
        self._lock = threading.Lock()
        self._entering: Tensor | None = None
        self._leaving: Tensor | None = None
        self._family = family_of(model.config)
        self._runs: dict[Part, PreTrainedModel] = {}
        self._accepts: dict[Part, Collection[str]] = {}
        owned = segments_of(model.config, segment)
        for stack in find_stacks(model):
            own = owned[stack.part].blocks
            # In front of the first own block where something is: blocks that are computed anew find it entered then.
            stack.blocks[max(0, own[0] - 1)].register_forward_pre_hook(self._enter, with_kwargs=True)
            last = task_head_places(model)[-1].module if segment.task_head else stack.blocks[own[-1]]
            last.register_forward_hook(self._leave)
            self._runs[stack.part] = runs = model if segment.task_head else stack.host
            self._accepts[stack.part] = inspect.signature(runs.forward).parameters
            self._cache_argument = cache_argument(inspect.signature(stack.host.forward).parameters)

    def __call__(
        self,
        hidden_BTD: Tensor,
        attention_mask_BT: Tensor | None,
        position_ids_BT: Tensor | None = None,
        *,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
        part: Part = Part.ONLY,
        encoder: EncoderStates | None = None,
        within: AbstractContextManager[object] | None = None,
    ) -> Tensor:
        """Run the segment; `within` is entered for the forward pass while no other one runs.

        Parameters
        ----------
        hidden_BTD : torch.Tensor
            Float, ``[B, T, D]``.
        attention_mask_BT : torch.Tensor or None
            Integer, ``[B, T]``, 1 for tokens and 0 for padding; with a cache, its tokens come first.
        position_ids_BT : torch.Tensor, optional
            Integer, ``[B, T]``; computed by the model when absent.
        cache : transformers.Cache, optional
            This segment's own (`segment_cache`); grows by T tokens.
        logits_to_keep : int
            How many last positions the language-model head answers for; 0 is all.
        part : Part
            Which stack is run.
        encoder : EncoderStates, optional
            What a decoder reads; once its cache holds what it made of them, only their shape and their mask count.

        Raises
        ------
        PartitionError
            If the model has no such part, or a decoder is run without an encoder's states.

        Returns
        -------
        torch.Tensor
            Hidden states ``[B, T, D]``, or the task head's output if this segment owns it.
        """
        if part not in self._runs or (encoder is None) is (part is Part.DECODER):
            raise PartitionError(
                f"the part {part.value!r} was to be run {'without' if encoder is None else 'with'} an encoder's "
                f"states, and the model's parts are {', '.join(self._runs)}; a decoder needs them and nothing else "
                "takes them. Name the part, and pass the states to a decoder only."
            )
        runs, accepts = self._runs[part], self._accepts[part]
        mask_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.int64, device=hidden_BTD.device)
        inputs: dict[str, Any] = {}
        if attention_mask_BT is not None:
            mask_BT = attention_mask_BT.to(device=hidden_BTD.device, dtype=torch.int64)
            inputs["attention_mask"] = mask_BT
        inputs["input_ids"] = self._surrogate_ids(mask_BT[:, -hidden_BTD.shape[1] :])
        if position_ids_BT is not None:
            inputs["position_ids"] = position_ids_BT.to(device=hidden_BTD.device, dtype=torch.int64)
        if encoder is not None:
            inputs["encoder_hidden_states"] = encoder.hidden_BSD
            if encoder.mask_BS is not None:
                inputs["encoder_attention_mask"] = encoder.mask_BS.to(device=hidden_BTD.device, dtype=torch.int64)
        if "use_cache" in accepts:
            inputs["use_cache"] = cache is not None
        if cache is not None:
            inputs[self._cache_argument] = cache
        if logits_to_keep and "logits_to_keep" in accepts:
            inputs["logits_to_keep"] = logits_to_keep
        with self._lock, within or nullcontext():
            self._entering = swap_time(hidden_BTD, self._family)
            try:
                runs(**inputs)
                leaving = self._leaving
            finally:
                self._entering = self._leaving = None
        assert leaving is not None
        return leaving

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep forward passes from running inside the block."""
        with self._lock:
            yield

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
        leaving = output[0] if isinstance(output, tuple) else output
        self._leaving = leaving if self._segment.task_head else swap_time(leaving, self._family)
