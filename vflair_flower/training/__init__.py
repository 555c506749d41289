"""Train and measure a task model on encoded rows; split or whole makes no difference here."""

from vflair_flower.training.evaluation import METRICS, Evaluated, commonest_token, evaluate, metric_of
from vflair_flower.training.loop import Trained, train_steps

__all__ = ["METRICS", "Evaluated", "Trained", "commonest_token", "evaluate", "metric_of", "train_steps"]
