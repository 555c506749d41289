"""Flower strategies that train a model in segments."""

from vflair_flower.strategies.generation import GenerationCounts
from vflair_flower.strategies.hub_settings import HubSettings
from vflair_flower.strategies.split_learning import RoundRecord, SplitLearning

__all__ = ["GenerationCounts", "HubSettings", "RoundRecord", "SplitLearning"]
