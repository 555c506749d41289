"""Gradient checkpointing of a segment: its blocks keep what goes in, and are computed again in the backward pass.

Chen et al., arXiv 1604.06174.  The hole itself is never computed again: the other party is called once per pass.
"""

from vflair_flower.errors import PartitionError
from vflair_flower.partition.loading import LoadedSegment
from vflair_flower.partition.structure import find_stacks


def checkpoint_blocks(loaded: LoadedSegment) -> None:
    """Let a segment's blocks be computed again in the backward pass.

    Of a segment that neither has the embedding nor leaves a block to others before its own (no head blocks), the first
    block is kept: the hidden state enters there.

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
    model.activation_checkpointing_enable({"use_reentrant": False})
    first = stacks[0].blocks[0]
    if not loaded.segment.embedding and loaded.segment.blocks[0] == 0:
        first.gradient_checkpointing = False  # type: ignore[assignment]
