"""What is learnt, from whose rows, and how well: data sets, dealing to parties, batches, metrics.

It knows no model, no session and no Flower.  From the ground up: `dataset` (the values), `labels`, `jsonl`, `hub`,
`wording`, `messages` and `rows` (where rows come from), `dealing` (who has which), `batches`, `metrics`.
"""

from vflair_flower.tasks.batches import Batch, BatchOrder, EncodedRow, collate, encode, padding_token_id
from vflair_flower.tasks.dataset import Row, Secret, SecretKind, TextDataset
from vflair_flower.tasks.dealing import DealKind, DealSettings, deal
from vflair_flower.tasks.messages import account_is_valid, generate_messages
from vflair_flower.tasks.metrics import (
    Interval,
    accuracy,
    bootstrap_interval,
    majority_accuracy,
    paired_bootstrap_difference,
    seed_interval,
)
from vflair_flower.tasks.rows import load_text_dataset

__all__ = [
    "Batch",
    "BatchOrder",
    "DealKind",
    "DealSettings",
    "EncodedRow",
    "Interval",
    "Row",
    "Secret",
    "SecretKind",
    "TextDataset",
    "account_is_valid",
    "accuracy",
    "bootstrap_interval",
    "collate",
    "deal",
    "encode",
    "generate_messages",
    "load_text_dataset",
    "majority_accuracy",
    "padding_token_id",
    "paired_bootstrap_difference",
    "seed_interval",
]
