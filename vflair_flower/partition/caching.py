"""Key-value caches of a cut model: every party caches its own blocks, and a hole keeps no states.

The data party's cache tells the others what `generate` does to it between two forward passes (beam search reorders
rows, assisted decoding takes tokens back), so that all parties' caches stay one.  A decoder that reads an encoder's
states caches what it makes of them as well: its cache is transformers' `EncoderDecoderCache` of two.
B rows, T tokens.
Invariant: `generate` on the cut model writes the tokens that it writes on the uncut one (`vflair verify`).
"""

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DummyLayer, EncoderDecoderCache

from vflair_flower.errors import PartitionError, SessionError
from vflair_flower.partition.structure import Part, stack_lengths

_numbers = itertools.count()


def segment_cache(config: PreTrainedConfig, blocks: Iterable[int]) -> Cache:
    """Return an empty cache for a party's own blocks of a model, or of its decoder.

    transformers then takes lengths and mask sizes from the first owned layer of each attention type, which is right,
    and not from an empty first layer, which writes wrong tokens without a word.
    """
    blocks = tuple(blocks)
    cache = DynamicCache(config=_cached_config(config))
    _leave_out(cache, blocks)
    return _beside_encoder(cache, config, blocks)


def split_cache(config: PreTrainedConfig, blocks: Iterable[int]) -> Cache:
    """Return an empty cache for the data party: a `SplitCache`, or an `EncoderDecoderCache` that begins with one."""
    blocks = tuple(blocks)
    return _beside_encoder(SplitCache(config, blocks), config, blocks)


def _beside_encoder(cache: DynamicCache, config: PreTrainedConfig, blocks: tuple[int, ...]) -> Cache:
    """Return the cache, with one of what is made of the encoder's states if the model has an encoder."""
    if Part.DECODER not in stack_lengths(config):
        return cache
    crossed = DynamicCache(config=_cached_config(config))
    pair = EncoderDecoderCache(cache, crossed)  # asks each layer of `crossed` for its length: none may be missing yet
    _leave_out(crossed, blocks)
    return pair


def _cached_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration that caches are made by: transformers takes an encoder's length for its decoder's."""
    text, lengths = config.get_text_config(decoder=True), stack_lengths(config)
    if Part.DECODER in lengths:
        text = copy.copy(text)
        text.num_hidden_layers = lengths[Part.DECODER]
    return text


def _leave_out(cache: Cache, blocks: Iterable[int]) -> None:
    owned = set(blocks)
    for index in range(len(cache.layers)):
        if index not in owned:
            cache.layers[index] = DummyLayer()


class SplitCache(DynamicCache):
    """The data party's cache; `generate` makes one by itself, pass your own (`split_cache`) to go on from it.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's.
    blocks : iterable of int
        The data party's own blocks.
    """

    is_compileable = False  # else `generate` would make 4-D masks, which do not cross

    def __init__(self, config: PreTrainedConfig, blocks: Iterable[int]) -> None:
        super().__init__(config=_cached_config(config))
        _leave_out(self, blocks)
        self.number = next(_numbers)
        """Names this cache among all of the process."""
        self.tokens = 0
        """T, how many tokens each row has so far, padding counted."""
        self.mask_BT: Tensor | None = None
        """Mask of those tokens, as it was sent."""
        self.records_past = False
        """Whether states beyond a sliding window are kept, so that tokens can be taken back."""
        self._rows: Tensor | None = None
        self._taken_back: int | None = None
        self._in_use = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return T; the parties' layers all hold as many, this one's too if it owns any."""
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return length and offset of the keys; as transformers does, but a party may own no layer at all."""
        if isinstance(self.layers[layer_idx], DummyLayer):
            return self.tokens + query_length, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows here, and with the next forward pass at the other parties."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type] # transformers means any int64 tensor
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows here, and with the next forward pass at the other parties."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row here, and with the next forward pass at the other parties."""
        super().batch_repeat_interleave(repeats)
        if self.mask_BT is not None:
            self._select(torch.arange(len(self.mask_BT)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back here, and with the next forward pass at the other parties.

        Parameters
        ----------
        tokens_to_remove : int
            0 or, as transformers counts, below: -2 takes the last two back.
        """
        if not -self.tokens <= tokens_to_remove <= 0:
            raise PartitionError(
                f"crop was called with {tokens_to_remove} on a cache of {self.tokens} tokens; it takes 0 to "
                f"{-self.tokens}: how many to take back, with a minus sign."
            )
        super().crop(tokens_to_remove)
        if self.mask_BT is not None:
            self.tokens += tokens_to_remove
            self.mask_BT = self.mask_BT[:, : self.tokens]
            # Also 0 is a change: it lets layers drop what they kept beyond their window.
            self._taken_back = (self._taken_back or 0) - tokens_to_remove

    def activate_past_recording(self) -> None:
        """Keep states beyond sliding windows, so that `crop` can go back, here and at the other parties."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]
        self.records_past = True

    def reset(self) -> None:
        """Empty the cache, here and with the next forward pass at the other parties."""
        super().reset()  # type: ignore[no-untyped-call]
        self.tokens, self.mask_BT, self._rows, self._taken_back = 0, None, None, None

    def enter(self) -> None:
        """Begin a forward pass; raise SessionError if the one before broke off, and the parties' parts differ."""
        if self._in_use:
            raise SessionError(
                "a forward pass with this cache broke off, so the parties may hold different tokens of it. Begin a new "
                "cache: generate again from the start."
            )
        self._in_use = True

    def leave(self) -> None:
        """End a forward pass that went well."""
        self.tokens = 0 if self.mask_BT is None else self.mask_BT.shape[1]
        self._in_use = False

    def take_changes(self) -> tuple[Tensor | None, int | None]:
        """Return, and forget, which rows are where (int64, ``[B]``) and how many tokens were taken back, or None."""
        changes = self._rows, self._taken_back
        self._rows, self._taken_back = None, None
        return changes

    def _select(self, indices: Tensor) -> None:
        indices = indices.to("cpu", torch.int64)
        if self.mask_BT is None:
            return
        self.mask_BT = self.mask_BT[indices]
        self._rows = indices if self._rows is None else self._rows[indices]


def cache_argument(forward_parameters: Iterable[str]) -> str:
    """Return the name under which a model's forward pass takes its cache."""
    return "cache_params" if "cache_params" in set(forward_parameters) else "past_key_values"


def followed(cache: Any) -> SplitCache | None:
    """Return what the other parties follow of a model's cache; raise PartitionError if they cannot follow it."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if own is not None and not isinstance(own, SplitCache):
        raise PartitionError(
            f"the cache is a {type(own).__name__}, which the other parties' caches cannot follow; it would write "
            "wrong tokens. Leave it out, and `generate` makes the right one, or pass "
            "vflair_flower.partition.SplitCache."
        )
    return own


def cache_layers(cache: Cache) -> list[Any]:
    """Return all layers of a cache, those of a pair one after the other."""
    if isinstance(cache, EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return list(cache.layers)
