"""Tiny models and data for tests: real transformers classes, random weights, a tokenizer of a few words."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from vflair_flower.clients import PartyRows
from vflair_flower.tasks import Row

WORDS = [
    "card",
    "account",
    "money",
    "transfer",
    "lost",
    "stolen",
    "pin",
    "code",
    "rate",
    "fee",
    "top",
    "up",
    "cash",
    "limit",
    "wait",
    "where",
    "why",
    "how",
    "my",
    "the",
    "is",
    "not",
    "please",
    "help",
    "now",
    "today",
    "bill",
    "order",
    "parcel",
    "late",
    "refund",
    "close",
    "open",
    "change",
    "name",
]
LABELS = ("card", "money", "parcel")
BLOCKS = 4


def save_tiny(folder: Path, family: str = "bert") -> Path:
    """Write a tiny classifier of `BLOCKS` blocks and its tokenizer; dropout is off."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    common = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "num_labels": len(LABELS),
    }
    torch.manual_seed(7)
    if family == "bert":
        config = BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = BertForSequenceClassification(config)
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**common, num_key_value_heads=2))
    # Weights this small would leave logits that no gradient moves: spread them.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    vocabulary_file = folder / "vocab.txt"
    vocabulary_file.write_text("\n".join(vocabulary))
    BertTokenizer(str(vocabulary_file)).save_pretrained(folder)
    return folder


def tiny_rows(party: int, *, num_train: int = 24, num_held_out: int = 8, marker: str = "") -> PartyRows:
    """Return made-up rows of one party; the first word decides the class."""
    generator = torch.Generator().manual_seed(100 + party)

    def make(count: int, split: str) -> tuple[Row, ...]:
        rows = []
        for i in range(count):
            label = int(torch.randint(len(LABELS), (1,), generator=generator))
            length = int(torch.randint(2, 9, (1,), generator=generator))
            words = [WORDS[int(torch.randint(len(WORDS), (1,), generator=generator))] for _ in range(length)]
            text = " ".join([("card", "money", "parcel")[label], *words, marker]).strip()
            rows.append(Row(text=text, label=label, id=f"p{party}-{split}-{i}"))
        return tuple(rows)

    return PartyRows(
        train=make(num_train, "train"),
        validation=make(num_held_out, "validation"),
        test=make(num_held_out, "test"),
        label_names=LABELS,
    )
