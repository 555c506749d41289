"""The stage of a cell: what the adversary sees and knows, and the truth for the scorer."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from vflair_flower.attacks import HeadKnowledge, Knowledge, Surrogate, auxiliary_texts, random_checkpoint
from vflair_flower.attacks.rehearsal import rehearse
from vflair_flower.attacks.scoring import Truth
from vflair_flower.audit.cells import Cell, parse_cut
from vflair_flower.audit.subject import Subject
from vflair_flower.partition import ModelSource, PartitionPlan
from vflair_flower.tasks import encode_task, padding_token_id


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """Everything that a cell needs.

    Parameters
    ----------
    view : object
        Goes to the attack.
    knows : Knowledge
        Goes to the attack.
    truth : Truth
        Goes to the scorer.
    """

    view: object
    knows: Knowledge
    truth: Truth


@contextmanager
def staged(subject: Subject, cell: Cell, *, device: torch.device | str = "cpu") -> Iterator[Stage]:
    """Set the stage: let the victim run its rows in a session and put together what the adversary has.

    Parameters
    ----------
    subject : Subject
        The run.
    cell : Cell
        What is asked.
    device : torch.device or str
        Where the adversary computes.
    """
    plan = parse_cut(cell.cut)
    victim = subject.source(cell.epoch)
    rehearsal = rehearse(
        victim,
        replace(subject.spec, plan=plan),
        subject.victims(cell.seed),
        subject.tokenizer,
        phase=cell.which.during,
        batch_rows=subject.spec.training.batch_size,
        secrets=subject.secrets,
    )
    with ExitStack() as stack:
        source = _known(subject, cell, victim, stack)
        knows = _knowledge(subject, cell, plan, source, victim, rehearsal.truth, device)
        yield Stage(view=rehearsal.view, knows=knows, truth=rehearsal.truth)


def _known(subject: Subject, cell: Cell, victim: ModelSource, stack: ExitStack) -> ModelSource:
    """Return the checkpoint that the adversary's copy of the model is loaded from."""
    if cell.knowledge == HeadKnowledge.EXACT:
        return victim
    if cell.knowledge == HeadKnowledge.PUBLIC:
        return subject.public
    return stack.enter_context(random_checkpoint(subject.public, subject.spec.task, seed=1_000_003 + cell.seed))


def _knowledge(
    subject: Subject,
    cell: Cell,
    plan: PartitionPlan,
    source: ModelSource,
    victim: ModelSource,
    truth: Truth,
    device: torch.device | str,
) -> Knowledge:
    task = subject.spec.task
    tokenizer = subject.tokenizer
    encoded = encode_task(task.kind, subject.auxiliary(), tokenizer, max_tokens=subject.spec.training.max_tokens)
    # Another classifier than the victim's, where the checkpoint has none: nobody shared the job's seed with it.
    seed = subject.spec.seed if cell.knowledge == HeadKnowledge.EXACT else 2_000_003 + cell.seed
    return Knowledge(
        head=HeadKnowledge(cell.knowledge),
        surrogate=Surrogate(source, plan, task, seed=seed, device=device),
        own=Surrogate(victim, plan, task, seed=subject.spec.seed, device=device),
        special_ids=frozenset(tokenizer.all_special_ids),
        pad_id=padding_token_id(tokenizer),
        auxiliary=auxiliary_texts(encoded, truth.ids),
    )
