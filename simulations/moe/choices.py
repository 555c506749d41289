"""How good a language model is: perplexity of held-out texts, and seven sets of multiple-choice questions.

A question is answered by the choice whose text the model finds likeliest after the question (`accuracy`), or likeliest
per character (`normalised`), as language-model evaluations commonly do.  The paper that this is compared with does not
name its seven sets; these are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from vflair_flower.errors import DataError
from vflair_flower.tasks import Likelihood, PromptRow, collate, encode_responses, likelihoods
from vflair_flower.tasks.jsonl import read_records

SETS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "boolq")
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question: a row for each choice, and which is right."""

    rows: tuple[PromptRow, ...]
    right: int


def load_questions(folder: Path, rows: int) -> dict[str, tuple[Question, ...]]:
    """Return the first so many questions of each set, from ``validation.jsonl`` or ``test.jsonl`` in its folder.

    Raises
    ------
    DataError
        If a set is missing.
    """
    return {name: _read(folder, name, rows) for name in SETS}


def _read(folder: Path, name: str, most: int) -> tuple[Question, ...]:
    files = [path for split in ("validation", "test") if (path := folder / name / f"{split}.jsonl").is_file()]
    if not files:
        raise DataError(
            f"{folder / name} has neither validation.jsonl nor test.jsonl. Add one, or set moe-choice-rows to 0."
        )
    questions: list[Question] = []
    for number, record in read_records(files[0]):
        if len(questions) == most:
            break
        choices = [str(choice) for choice in cast("list[str]", record["choices"])]
        if "continuation" in record:  # one ending after each of two beginnings
            pairs = [(choice, f" {record['continuation']}") for choice in choices]
        else:
            asked = record.get("context") or f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
            pairs = [(str(asked), f" {choice}") for choice in choices]
        rows = [PromptRow(prompt=p, response=r, id=f"{name}:{number}:{i}") for i, (p, r) in enumerate(pairs)]
        questions.append(Question(rows=tuple(rows), right=int(str(record["label"]))))
    return tuple(questions)


def measure_choices(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: dict[str, tuple[Question, ...]], max_tokens: int
) -> dict[str, dict[str, float]]:
    """Return for each set `accuracy`, `normalised`, `chance` and `n`."""
    figures = {}
    for name, asked in questions.items():
        rows = [row for question in asked for row in question.rows]
        found = iter(row_likelihoods(model, tokenizer, rows, max_tokens))
        right = normalised = chance = 0.0
        for question in asked:
            costs = [next(found).nll for _ in question.rows]
            per_character = [c / len(r.response) for c, r in zip(costs, question.rows, strict=True)]
            right += costs.index(min(costs)) == question.right
            normalised += per_character.index(min(per_character)) == question.right
            chance += 1 / len(question.rows)
        n = len(asked)
        figures[name] = {"accuracy": right / n, "normalised": normalised / n, "chance": chance / n, "n": float(n)}
    return figures


@torch.no_grad()
def row_likelihoods(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow], max_tokens: int
) -> list[Likelihood]:
    """Return how likely a model finds the response of each row; it is left in evaluation mode."""
    model.eval()
    encoded = encode_responses(rows, tokenizer, max_tokens=max_tokens, add_end=False)
    by_length = sorted(range(len(rows)), key=lambda i: len(encoded[i].input_ids))
    found: dict[int, Likelihood] = {}
    for start in range(0, len(rows), _BATCH):
        places = by_length[start : start + _BATCH]
        batch = collate([encoded[i] for i in places], pad_token_id=int(tokenizer.pad_token_id))
        logits_BTV = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        found |= dict(zip(places, likelihoods(logits_BTV, batch), strict=True))
    return [found[i] for i in range(len(rows))]


def perplexity(found: Sequence[Likelihood]) -> float:
    """Return the exponential of the mean negative log-likelihood per token."""
    return math.exp(sum(one.nll for one in found) / sum(one.tokens for one in found))
