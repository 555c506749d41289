"""Gradient checkpointing of an owner's blocks: computed again in the backward pass, without asking any host again.

What hosts answered, a vector for each row, is kept beside the block's input and taken again (`ExpertChannel.replay`).
Invariant: a host is called once per layer and pass, as without it, and the results are the same bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from vflair_flower.experts.dispatch import ExpertChannel, Replay
from vflair_flower.partition import LoadedSegment, checkpoint_blocks
from vflair_flower.partition.recompute import Contexts


def checkpoint_owner(loaded: LoadedSegment, channel: ExpertChannel) -> None:
    """Let the blocks of a party's own model be computed again in the backward pass.

    Parameters
    ----------
    loaded : LoadedSegment
        As `load_backbone` returned it.
    channel : ExpertChannel
        Its.

    Raises
    ------
    PartitionError
        If the family does not have it.
    """

    @contextmanager
    def using(replay: Replay) -> Iterator[None]:
        before, channel.replay = channel.replay, replay
        try:
            yield
        finally:
            channel.replay = before

    def contexts() -> Contexts:
        """Return what torch enters when it runs a block for the first time, and when it runs it again."""
        replay = Replay()
        return using(replay), using(replay)

    checkpoint_blocks(loaded, contexts=contexts)
