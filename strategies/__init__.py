"""Flower strategies that train a model in segments, and the one that audits what leaked."""

from vflair_flower.strategies.collaborative_moe import CollaborativeMoE
from vflair_flower.strategies.generation import GenerationCounts
from vflair_flower.strategies.hub_settings import HubSettings
from vflair_flower.strategies.leakage_audit import AuditOutcome, LeakageAudit
from vflair_flower.strategies.session_strategy import RoundRecord, SessionStrategy
from vflair_flower.strategies.split_learning import SplitLearning

__all__ = [
    "AuditOutcome",
    "CollaborativeMoE",
    "GenerationCounts",
    "HubSettings",
    "LeakageAudit",
    "RoundRecord",
    "SessionStrategy",
    "SplitLearning",
]
