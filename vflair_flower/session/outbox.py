"""The outbox: what waits to go into a stream.

What it is: a queue of chunks with one reader (the stream) and many writers, bounded in bytes.  What it is not: a
transport; both planes read from it.  Invariant: chunks of two frames never mix, and a frame that was begun is written
to its end, so that neither a deadline nor a slow reader can break a stream in the middle of a frame.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from vflair_flower.session.emulation import DueTimes, LinkEmulation

CAP_BYTES = 8 << 20
"""A frame is begun only while fewer bytes than this wait."""
HELD_CAP_BYTES = 1 << 30
"""The same, while the stream is still to come: callers should not wait for a party that is on its way."""


class Outbox:
    """Queue chunks for one stream.

    Parameters
    ----------
    cap_bytes : int
        A writer waits while so many bytes are queued.
    held : bool
        Whether the stream is still to come; until `release`, far more may wait.
    emulate : LinkEmulation | None
        A slower link than there is.
    """

    def __init__(self, *, cap_bytes: int = CAP_BYTES, held: bool = False, emulate: LinkEmulation | None = None) -> None:
        self._cap_bytes = cap_bytes
        self._held = held
        self._changed = threading.Condition()
        self._due = DueTimes(emulate)
        self._chunks: deque[tuple[bytes, Callable[[], None] | None, float]] = deque()
        self._bytes = 0
        self._writing = False
        self._finishing = False
        self._abandoned = False

    def send(
        self,
        chunks: Iterable[bytes],
        *,
        on_taken: Callable[[], None] | None = None,
        timeout_s: float | None = None,
        urgent: bool = False,
    ) -> bool:
        """Queue the chunks of one frame; return False when the stream has ended.

        Parameters
        ----------
        chunks : Iterable[bytes]
            The frame; read here, chunk by chunk, so that nothing keeps its tensors after the return.
        on_taken : Callable[[], None] | None
            Called by the stream when it takes the first chunk.
        timeout_s : float | None
            How long to wait for room.
        urgent : bool
            Whether to send even when there is no room.

        Raises
        ------
        TimeoutError
            When there was no room in time; nothing of the frame was queued.
        """
        with self._changed:
            ready = self._changed.wait_for(
                lambda: self._ended or (not self._writing and (urgent or self._bytes < self._cap)),
                timeout_s,
            )
            if not ready:
                raise TimeoutError
            if self._ended:
                return False
            self._writing = True
        whole = False
        try:
            for chunk in chunks:
                with self._changed:
                    if not self._abandoned:
                        self._chunks.append((chunk, on_taken, self._due.next(len(chunk))))
                        self._bytes += len(chunk)
                        on_taken = None
                        self._changed.notify_all()
            whole = True
        finally:
            with self._changed:
                self._writing = False
                if not whole:
                    self._abandon()
                self._changed.notify_all()
        return not self._abandoned

    def release(self) -> None:
        """Say that the stream is there: from now on writers wait when it is full."""
        with self._changed:
            self._held = False

    def finish(self) -> None:
        """Take no further frame; the stream carries what is queued and ends."""
        with self._changed:
            self._finishing = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Drop what is queued and end the stream."""
        with self._changed:
            self._abandon()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self._abandoned or (self._finishing and not self._writing))
            while self._chunks and (wait_s := self._chunks[0][2] - time.monotonic()) > 0:
                self._changed.wait(wait_s)
            if not self._chunks:
                raise StopIteration
            chunk, on_taken, _ = self._chunks.popleft()
            self._bytes -= len(chunk)
            self._changed.notify_all()
        if on_taken is not None:
            on_taken()
        return chunk

    @property
    def _cap(self) -> int:
        return HELD_CAP_BYTES if self._held else self._cap_bytes

    @property
    def _ended(self) -> bool:
        return self._finishing or self._abandoned

    def _abandon(self) -> None:
        self._abandoned = True
        self._chunks.clear()
        self._bytes = 0
        self._changed.notify_all()
