"""Cut a transformers model and load, tune and merge its segments."""

from vflair_flower.partition.adapters import (
    freeze_part,
    load_trained_state,
    make_trainable,
    refuse_trained_copies,
    save_merged_adapter,
    trained_state,
)
from vflair_flower.partition.caching import SplitCache
from vflair_flower.partition.cut import cut
from vflair_flower.partition.holes import Channel, SegmentCall
from vflair_flower.partition.loading import LoadedSegment, load_segment, load_tokenizer
from vflair_flower.partition.plan import Mode, PartitionPlan, Segment
from vflair_flower.partition.recompute import checkpoint_blocks
from vflair_flower.partition.runner import SegmentRunner
from vflair_flower.partition.sources import DEFAULT_MODEL, ModelSource, load_config, resolve_model

__all__ = [
    "DEFAULT_MODEL",
    "Channel",
    "LoadedSegment",
    "Mode",
    "ModelSource",
    "PartitionPlan",
    "Segment",
    "SegmentCall",
    "SegmentRunner",
    "SplitCache",
    "checkpoint_blocks",
    "cut",
    "freeze_part",
    "load_config",
    "load_segment",
    "load_tokenizer",
    "load_trained_state",
    "make_trainable",
    "refuse_trained_copies",
    "resolve_model",
    "save_merged_adapter",
    "trained_state",
]
