"""The model party's key-value caches: one per text batch that a data party is writing, kept apart by party.

B rows, T tokens.
Invariant: a party reaches its own caches only, and no more of them than agreed; a cache that nobody used within the
deadline, or whose party has left, is gone; and a call that counts on other tokens than are here is refused.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from vflair_flower.errors import SessionError
from vflair_flower.partition.caching import cache_layers, segment_cache
from vflair_flower.partition.holes import EncoderStates
from vflair_flower.settings import GenerationSettings


@dataclass
class PartyCache:
    """One cache, the mask of the tokens in it, and of a decoder the mask of what its encoder has read."""

    states: Cache
    used_at: float
    mask_BT: Tensor | None = None
    encoder_mask_BS: Tensor | None = None

    @property
    def tokens(self) -> int:
        """T, how many tokens each row has."""
        return 0 if self.mask_BT is None else self.mask_BT.shape[1]

    def follow(self, *, rows_B: Tensor | None, taken_back: int | None, records_past: bool) -> None:
        """Do what the data party did to its cache: keep states to go back to, choose rows, take tokens back."""
        if records_past:
            self.states.activate_past_recording()
        if self.mask_BT is None:
            return
        if rows_B is not None:
            self._select(rows_B.to(torch.int64))
        if taken_back is None:
            return
        if not 0 <= taken_back <= self.tokens:
            raise SessionError(
                f"{taken_back} tokens were to be taken back, and the cache holds {self.tokens}; the two sides "
                "disagree. Begin a new cache."
            )
        self.states.crop(-taken_back)
        self.mask_BT = self.mask_BT[:, : self.tokens - taken_back]

    def grown(self, new_mask_BT: Tensor, *, tokens: int, max_length: int) -> Tensor:
        """Return the mask, int64 ``[B, T]``, with the new tokens, if the data party's cache holds `tokens` as well."""
        new_mask_BT = new_mask_BT.to(torch.int64)
        if self.tokens != tokens:
            raise SessionError(
                f"the cache holds {self.tokens} tokens here and {tokens} at the data party; it would write wrong "
                "tokens. Begin a new cache."
            )
        length = tokens + new_mask_BT.shape[1]
        if length > max_length:
            raise SessionError(
                f"a row would reach {length} tokens, and {max_length} were agreed; ask for fewer new tokens, or raise "
                "max_length in the job's generation settings."
            )
        if self.mask_BT is None:
            return new_mask_BT
        if len(new_mask_BT) != len(self.mask_BT):
            raise SessionError(
                f"{len(new_mask_BT)} rows came for a cache of {len(self.mask_BT)}; both sides must hold the same rows. "
                "Begin a new cache."
            )
        return torch.cat([self.mask_BT, new_mask_BT], dim=1)

    def encoder_states(self, width: int) -> EncoderStates | None:
        """Return what stands for the encoder's states once the cache holds what was made of them: shape and mask."""
        if self.encoder_mask_BS is None:
            return None
        hidden_BSD = torch.zeros(1, 1, 1).expand(*self.encoder_mask_BS.shape, width)
        return EncoderStates(hidden_BSD=hidden_BSD, mask_BS=self.encoder_mask_BS)

    def _select(self, rows_B: Tensor) -> None:
        assert self.mask_BT is not None
        if rows_B.numel() and not 0 <= int(rows_B.min()) <= int(rows_B.max()) < len(self.mask_BT):
            raise SessionError(
                f"rows {int(rows_B.min())}..{int(rows_B.max())} were asked for of a cache of {len(self.mask_BT)}. "
                "Begin a new cache."
            )
        self.states.reorder_cache(rows_B)  # type: ignore[arg-type] # transformers means any int64 tensor
        self.mask_BT = self.mask_BT[rows_B]
        if self.encoder_mask_BS is not None:
            self.encoder_mask_BS = self.encoder_mask_BS[rows_B]


class PartyCaches:
    """All caches of a segment.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's.
    blocks : iterable of int
        The segment's own blocks, of the stack that writes.
    settings : GenerationSettings
        The bounds.
    deadline_s : float
        A cache that was not used for as long is let go, in seconds.
    clock : callable
        Tells the seconds; for tests.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        blocks: Iterable[int],
        settings: GenerationSettings,
        deadline_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._blocks = tuple(blocks)
        self._settings = settings
        self._deadline_s = deadline_s
        self._clock = clock
        self._lock = threading.Lock()
        self._caches: dict[tuple[str, int], PartyCache] = {}
        self._timer: threading.Timer | None = None

    def __len__(self) -> int:
        return len(self._caches)

    def get(self, party: str, number: int, *, tokens: int) -> PartyCache:
        """Return a party's cache that is to hold some tokens, or with 0 tokens a new one.

        Raises
        ------
        SessionError
            If there is no such cache (any more).
        """
        with self._lock:
            now = self._clock()
            self._let_go_idle(now)
            key = (party, number)
            if tokens == 0:
                self._caches.pop(key, None)
                own = [k for k in self._caches if k[0] == party]
                if len(own) >= self._settings.max_caches:
                    del self._caches[min(own, key=lambda k: self._caches[k].used_at)]
                self._caches[key] = PartyCache(segment_cache(self._config, self._blocks), now)
                self._watch()
            elif key not in self._caches:
                raise SessionError(
                    f"the model party has no cache {number} of '{party}' (any more): a call with it failed, nobody "
                    f"used it for {self._deadline_s:g} s, more than {self._settings.max_caches} were open "
                    "(max_caches), or it is of another session. Generate again from the start."
                )
            cache = self._caches[key]
            cache.used_at = now
            return cache

    def finish(self, party: str, numbers: Iterable[int]) -> None:
        """Let go of caches that their party has no more use for."""
        with self._lock:
            for number in numbers:
                self._caches.pop((party, number), None)
            self._rest()

    def leave(self, party: str) -> None:
        """Let go of all that a party had."""
        with self._lock:
            for key in [key for key in self._caches if key[0] == party]:
                del self._caches[key]
            self._rest()

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._caches.clear()
            self._rest()

    def state_bytes(self) -> int:
        """Return the bytes of all cached states."""
        with self._lock:
            layers = [layer for cache in self._caches.values() for layer in cache_layers(cache.states)]
        return sum(t.numel() * t.element_size() for layer in layers for t in _tensors(vars(layer).values()))

    def _let_go_idle(self, now: float) -> None:
        for key in [key for key, cache in self._caches.items() if now - cache.used_at >= self._deadline_s]:
            del self._caches[key]

    def _watch(self) -> None:
        """Have idle caches let go of also when no call comes any more."""
        if self._timer is None and self._caches:
            self._timer = threading.Timer(min(self._deadline_s, threading.TIMEOUT_MAX), self._on_time)
            self._timer.daemon = True
            self._timer.start()

    def _rest(self) -> None:
        if self._timer is not None and not self._caches:
            self._timer.cancel()
            self._timer = None

    def _on_time(self) -> None:
        with self._lock:
            self._timer = None
            self._let_go_idle(self._clock())
            self._watch()


def _tensors(values: Iterable[object]) -> Iterable[Tensor]:
    """Yield tensors, those in lists as well: linear attention keeps several states."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
