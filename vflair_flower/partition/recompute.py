"""Gradient checkpointing of a segment: its blocks keep what goes in, and are computed again in the backward pass.

Chen et al., arXiv 1604.06174.  The hole itself is never computed again: the other party is called once per pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from vflair_flower.errors import PartitionError
from vflair_flower.partition.loading import LoadedSegment
from vflair_flower.partition.structure import find_stacks

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def checkpoint_blocks(loaded: LoadedSegment, *, contexts: Callable[[], Contexts] | None = None) -> None:
    """Let a segment's blocks be computed again in the backward pass.

    Of a segment that neither has the embedding nor leaves a block to others before its own (no head blocks), the first
    block is kept: the hidden state enters there.

    Parameters
    ----------
    loaded : LoadedSegment
        The segment.
    contexts : callable, optional
        Returns, for each run of a block, what it is run in and what it is run in again.

    Raises
    ------
    PartitionError
        If the family does not have it, or has an encoder and a decoder.
    """
    model, stacks = loaded.model, find_stacks(loaded.model)
    if len(stacks) > 1 or not model.supports_gradient_checkpointing:
        raise PartitionError(
            f"gradient_checkpointing is set, and the model family {model.config.model_type!r} is not trained with it "
            "here: it has an encoder and a decoder, or transformers does not have it. Set gradient_checkpointing to "
            "False; a smaller micro_batch_size saves memory too."
        )
    settings: dict[str, Any] = {"use_reentrant": False}
    if contexts is not None:
        settings["context_fn"] = contexts
    model.activation_checkpointing_enable(settings)
    first = stacks[0].blocks[0]
    if not loaded.segment.embedding and loaded.segment.blocks[0] == 0:
        first.gradient_checkpointing = False  # type: ignore[assignment]
