"""Train and evaluate a classifier on encoded rows; split or whole makes no difference here."""

from vflair_flower.training.loop import Evaluated, Trained, evaluate, train_steps

__all__ = ["Evaluated", "Trained", "evaluate", "train_steps"]
