"""Model completion: put a tail behind the body's answers, trained on texts of the adversary's own.

B rows, T tokens, D hidden, C classes, V vocabulary.  It needs no gradient: a forward pass is enough.  Of a classifier
the task head is new and says nothing until it is trained; a language model's public tail predicts words as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vflair_flower.attacks.guesses import NOTHING, LabelGuess, TextGuess
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.labels.seen import CLASSIFIES_OR_WRITES, can_be_asked, guess_of, pooled, tail_pass
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.attacks.view import SplitView
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.partition import Mode
from vflair_flower.partition.structure import find_stacks
from vflair_flower.tasks import IGNORED, Encoded, EncodedRow, EncodedText, collate


@attack(
    "model-completion",
    goal=Goal.LABELS,
    sees=SplitView,
    paper="Fu et al., USENIX Security 2022, arXiv 2202.06684; without unlabelled rows, and the tail sits "
    "behind the true body, as in VFLAIR-LLM",
    modes=(Mode.HBT,),
    kinds=CLASSIFIES_OR_WRITES,
)
def model_completion(
    view: SplitView,
    knows: Knowledge,
    *,
    seed: int = 0,
    auxiliary_rows: int = 200,
    epochs: int = 30,
    rate: float = 1e-3,
    batch_rows: int = 16,
    trains_blocks: bool = False,
    trains_writing: bool = False,
) -> LabelGuess | TextGuess:
    """Train the surrogate's tail behind the body, and let it answer for the victim.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    auxiliary_rows : int
        How many of the adversary's own rows it is trained on, at most.
    epochs, rate, batch_rows
        Of Adam, on these rows.
    trains_blocks : bool
        Whether the tail's blocks are trained too, and not the task head alone.
    trains_writing : bool
        Whether a language model's tail is trained; else it is taken as it is.
    """
    if knows.surrogate.task.kind.reads_whole_texts or trains_writing:
        rows = labelled(knows, auxiliary_rows)
        with completed(knows, rows, epochs=epochs, rate=rate, batch_rows=batch_rows, blocks=trains_blocks, seed=seed):
            return _answers(view, knows)
    return _answers(view, knows)


def labelled(knows: Knowledge, count: int) -> list[EncodedRow | EncodedText]:
    """Return the adversary's rows that say what they are answered with; raise DataError if there is none."""
    classifies = knows.surrogate.task.kind.reads_whole_texts
    wanted = EncodedRow if classifies else EncodedText
    rows = [row for row in knows.auxiliary if isinstance(row, wanted)][:count]
    if not rows:
        raise DataError(
            f"the adversary has {len(knows.auxiliary)} auxiliary texts, of which it may use {count}, and none with a "
            "label; a tail cannot be trained on them. Give it labelled rows."
        )
    return rows


@contextmanager
def completed(
    knows: Knowledge,
    rows: Sequence[EncodedRow | EncodedText],
    *,
    epochs: int,
    rate: float,
    batch_rows: int,
    blocks: bool,
    seed: int,
) -> Iterator[None]:
    """Have the surrogate's tail trained on rows inside the block, and as it was behind it.

    Parameters
    ----------
    knows : Knowledge
        Its surrogate gives head and tail, and its `own`, if there is one, the body.
    rows : sequence
        Labelled rows.
    epochs, rate, batch_rows, blocks, seed
        As in `model_completion`.
    """
    if epochs < 1 or batch_rows < 1 or rate <= 0:
        raise ConfigurationError(
            f"a tail is to be trained for {epochs} epochs of {batch_rows} rows at rate {rate}; all must be above 0."
        )
    surrogate, model = knows.surrogate, knows.surrogate.tail_model
    trained = _trained(model, blocks)
    before = [parameter.detach().clone() for parameter in trained]
    seen = [_answered(knows, rows[i : i + batch_rows]) for i in range(0, len(rows), batch_rows)]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(trained, lr=rate)
    try:
        for parameter in trained:
            parameter.requires_grad_()
        with torch.enable_grad():
            for _ in range(epochs):
                for place in torch.randperm(len(seen), generator=generator).tolist():
                    answer, mask_BT, labels = seen[place]
                    logits = pooled(surrogate.tail(answer, mask_BT), mask_BT, surrogate.task)
                    optimizer.zero_grad()
                    cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED).backward()
                    optimizer.step()
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(trained, before, strict=True):
                parameter.copy_(old)
                parameter.requires_grad_(False)
                parameter.grad = None


def _trained(model: nn.Module, blocks: bool) -> list[nn.Parameter]:
    stack = find_stacks(model)[-1].blocks  # type: ignore[arg-type]
    kept = set() if blocks else {id(parameter) for parameter in stack.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in kept]


@torch.no_grad()
def _answered(knows: Knowledge, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the body answers to rows of the adversary's, their mask, and a label for each item of the logits."""
    surrogate, body = knows.surrogate, knows.own or knows.surrogate
    batch = collate(rows, pad_token_id=knows.pad_id)
    mask_BT = batch.attention_mask.to(surrogate.device)
    hidden_BTD = surrogate.head_of_ids(batch.input_ids.to(surrogate.device), mask_BT)
    labels = batch.labels.to(surrogate.device)
    if not surrogate.task.kind.reads_whole_texts:  # the label of a token stands where it is predicted
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    return body.body(hidden_BTD.to(body.device), mask_BT).to(surrogate.device), mask_BT, labels


@torch.no_grad()
def _answers(view: SplitView, knows: Knowledge) -> LabelGuess | TextGuess:
    found, scores = [], []
    for exchange in view.exchanges:
        logits = tail_pass(knows.surrogate, exchange).logits.detach()
        best = logits.argmax(-1)
        if not view.task.kind.reads_whole_texts:
            best = best.where(can_be_asked(exchange, view.task.kind).to(best.device), NOTHING)
        elif logits.shape[-1] == 2:
            scores.append((logits[:, 1] - logits[:, 0]).cpu())
        found.append(best)
    guess = guess_of(view, found)
    return (
        LabelGuess(labels=guess.labels, scores=torch.cat(scores)) if isinstance(guess, LabelGuess) and scores else guess
    )
