"""Texts of several kinds and who has which: real ones from a folder of data sets, or made-up messages without any.

Each kind (sums, code, dialogues, news, ...) is a domain; "iid" deals all of them to all, "skewed" gives each party
domains of its own.  Invariant: the same settings give the same rows, and held-out rows are in no training part.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vflair_flower.errors import DataError
from vflair_flower.tasks import PromptRow, generate_messages
from vflair_flower.tasks.jsonl import read_records

_Make = Callable[[dict[str, Any]], str]


def _joined(*columns: str) -> _Make:
    return lambda record: "\n".join(str(record[column]) for column in columns if record.get(column))


DOMAINS: dict[str, _Make] = {
    "gsm8k": _joined("question", "answer"),
    "code_alpaca": _joined("instruction", "input", "output"),
    "mts_dialog": _joined("dialogue", "section_text"),
    "ag_news": _joined("text"),
    "alpaca": _joined("instruction", "input", "output"),
    "squad": _joined("context"),
    "banking77": _joined("text"),
    "dolly_hhrlhf": _joined("instruction", "input", "output"),
}
"""Data sets and how a row becomes a text; each has ``train.jsonl`` and ``validation.jsonl`` in a folder of its name."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Rows by domain.

    Parameters
    ----------
    domains : tuple[str, ...]
        Names.
    train, held_out : tuple[tuple[PromptRow, ...], ...]
        For each domain its rows; a row is an empty prompt and a text.
    """

    domains: tuple[str, ...]
    train: tuple[tuple[PromptRow, ...], ...]
    held_out: tuple[tuple[PromptRow, ...], ...]

    @property
    def all_held_out(self) -> tuple[PromptRow, ...]:
        """Held-out rows, one domain after another in turn, so that any first part has all of them."""
        longest = max(map(len, self.held_out))
        return tuple(rows[i] for i in range(longest) for rows in self.held_out if i < len(rows))

    def dealt(self, parties: int, partition: str, seed: int, *, held_out: bool = False) -> list[tuple[PromptRow, ...]]:
        """Return each party's rows, in equal parts.

        ``"iid"``: shuffled together.  ``"skewed"``: domain after domain, in an order drawn from the seed, so that a
        party has few of them; held-out rows are dealt as the training rows are.
        """
        draw = random.Random(f"{seed}|{partition}")
        order = list(range(len(self.domains)))
        draw.shuffle(order)
        rows: list[PromptRow] = []
        for index in order:
            own = list((self.held_out if held_out else self.train)[index])
            draw.shuffle(own)
            rows += own
        if partition == "iid":
            draw.shuffle(rows)
        cuts = [round(len(rows) * i / parties) for i in range(parties + 1)]
        return [tuple(rows[a:b]) for a, b in itertools.pairwise(cuts)]


@lru_cache(maxsize=2)
def load_texts(folder: Path | None, rows: int, held_out_rows: int) -> Texts:
    """Load at most so many rows of each domain, from a folder of data sets or made up.

    Raises
    ------
    DataError
        If the folder lacks a data set.
    """
    if folder is None:
        return _made_up(rows, held_out_rows)
    missing = [name for name in DOMAINS if not (folder / name / "train.jsonl").is_file()]
    if missing:
        raise DataError(
            f"{folder} has no {missing[0]}/train.jsonl; the PC-MoE job takes one folder for each of "
            f"{', '.join(DOMAINS)}. Add it, or leave moe-data empty for made-up messages."
        )
    return Texts(
        domains=tuple(DOMAINS),
        train=tuple(_read(folder, name, "train", rows) for name in DOMAINS),
        held_out=tuple(_read(folder, name, "validation", held_out_rows) for name in DOMAINS),
    )


def _read(folder: Path, name: str, split: str, most: int) -> tuple[PromptRow, ...]:
    """Return different texts of a split; several rows of one data set may share theirs."""
    found: dict[str, PromptRow] = {}
    for number, record in read_records(folder / name / f"{split}.jsonl"):
        text = DOMAINS[name](record)
        if text.strip() and text not in found:
            found[text] = PromptRow(prompt="", response=text, id=f"{name}/{split}:{number}")
        if len(found) == most:
            break
    return tuple(found.values())


def _made_up(rows: int, held_out_rows: int) -> Texts:
    made = generate_messages(num_train=max(24, 16 * rows), num_validation=16 * held_out_rows, num_test=0)
    names = made.label_names

    def of(split: str, most: int) -> tuple[tuple[PromptRow, ...], ...]:
        return tuple(
            tuple(
                PromptRow(prompt="", response=row.text, id=row.id) for row in made.splits[split] if row.label == label
            )[:most]
            for label in range(len(names))
        )

    return Texts(domains=tuple(names), train=of("train", rows), held_out=of("validation", held_out_rows))


def pretraining_text(texts: Texts, split: str) -> str:
    """Return the texts as one, for pretraining where there is no other text."""
    parts: Sequence[tuple[PromptRow, ...]] = texts.train if split == "train" else texts.held_out
    return "\n".join(row.response for rows in parts for row in rows)
