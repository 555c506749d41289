"""Cut a transformers model and load, tune and merge its segments."""

from vflair_flower.partition.adapters import (
    load_trained_state,
    make_trainable,
    save_merged_adapter,
    trained_state,
)
from vflair_flower.partition.cut import Channel, SegmentCall, SegmentRunner, cut
from vflair_flower.partition.loading import LoadedSegment, load_segment, load_tokenizer
from vflair_flower.partition.plan import Mode, PartitionPlan, Segment
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
    "cut",
    "load_config",
    "load_segment",
    "load_tokenizer",
    "load_trained_state",
    "make_trainable",
    "resolve_model",
    "save_merged_adapter",
    "trained_state",
]
