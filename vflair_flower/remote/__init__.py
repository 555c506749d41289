"""Both ends of a cut: the data party's differentiable call, and the model party's server of its segment."""

from vflair_flower.remote.protocol import MODEL_PARTY, agreement_for
from vflair_flower.remote.segment import RemoteSegment
from vflair_flower.remote.server import SegmentServer, parameter_counts
from vflair_flower.remote.updates import BodyMode

__all__ = ["MODEL_PARTY", "BodyMode", "RemoteSegment", "SegmentServer", "agreement_for", "parameter_counts"]
