"""A victim's finished model beside a mix of texts that it was trained on and texts that it was not.

The truth goes to the scorer alone: candidates are in random order and have new ids.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from vflair_flower.attacks.membership.view import ModelView
from vflair_flower.attacks.scoring import Truth
from vflair_flower.errors import DataError
from vflair_flower.partition import ModelSource, Segment, load_config, load_segment
from vflair_flower.partition.structure import num_blocks
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import Encoded, EncodedRow, Example, encode_task


class MemberRehearsal(NamedTuple):
    """What came of mixing members with others.

    Parameters
    ----------
    view : ModelView
        For attacks.
    truth : Truth
        For the scorer alone; its `members` say which candidates were trained on.
    """

    view: ModelView
    truth: Truth

    @property
    def base_rate(self) -> float:
        """The share of members among the candidates, which is the precision of a guess without looking."""
        assert self.truth.members is not None
        return float(self.truth.members.double().mean())


def member_rehearsal(
    trained: ModelSource,
    spec: SplitSpec,
    members: Sequence[Example],
    non_members: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    seed: int = 0,
) -> MemberRehearsal:
    """Mix rows that a model was trained on with others, in random order.

    Parameters
    ----------
    trained : ModelSource
        The whole trained model, such as `vflair_flower.partition.merging.merge_model` writes.
    spec : SplitSpec
        The job that trained it.
    members, non_members : sequences of examples
        Rows that were trained on, and rows that were not but come from where these come from: if the two differ in
        anything else, an attack finds that instead.
    tokenizer : PreTrainedTokenizerBase
        The model's.
    max_tokens : int, optional
        As the training had it, which is the default.
    seed : int
        Of the order.

    Raises
    ------
    DataError
        One of the two is empty, or a text is in both.
    """
    tokens = max_tokens or spec.training.max_tokens
    groups = [list(encode_task(spec.task.kind, rows, tokenizer, max_tokens=tokens)) for rows in (members, non_members)]
    if not all(groups):
        raise DataError(
            f"there are {len(groups[0])} members and {len(groups[1])} others; an attack is measured by telling one "
            "from the other. Give rows of both."
        )
    own = {_content(row) for row in groups[0]}
    shared = [row.row_id for row in groups[1] if _content(row) in own]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(groups[1])} rows that count as not trained on have the tokens of one that was, the "
            f"first is {shared[0]!r}; nobody could tell these apart. Take them out of either."
        )
    joined = groups[0] + groups[1]
    order = torch.randperm(len(joined), generator=torch.Generator().manual_seed(seed))
    mixed = [joined[int(place)] for place in order]
    nameless = tuple(replace(row, row_id=f"candidate-{place}") for place, row in enumerate(mixed))
    segment = Segment.whole(num_blocks(load_config(trained, spec.task)))
    model = load_segment(trained, segment, spec.task, seed=spec.seed).model.eval().requires_grad_(False)
    truth = replace(Truth.of(mixed, tokenizer), members=order < len(groups[0]))
    return MemberRehearsal(ModelView(model=model, candidates=nameless, spec=spec), truth)


def _content(row: Encoded) -> tuple[object, ...]:
    asked = row.label if isinstance(row, EncodedRow) else getattr(row, "labels", None)
    return tuple(row.input_ids), asked
