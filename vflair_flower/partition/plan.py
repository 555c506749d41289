"""Where a model is cut: how many blocks each party owns.  Counting only; no model is touched here.

Dimensions: a model of N blocks, numbered 0..N-1.  The data party owns the first `head_blocks` and, in Head-Body-Tail,
the last `tail_blocks`; the model party owns what lies between (HBT) or everything after the head (HT).  Where a model
has two stacks of blocks, an encoder and a decoder, N counts the encoder's, and both are cut alike (`Segment.of_stack`).
Invariant: every block, the embedding and the task head are owned by exactly one party.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from vflair_flower.errors import PartitionError


class Mode(StrEnum):
    """How a model is cut (VFLAIR-LLM, arXiv 2508.03097, section 3)."""

    HT = "HT"
    """Head-Tail: the model party owns the rest of the model, task head included; logits come back."""
    HBT = "HBT"
    """Head-Body-Tail: embedding, first and last blocks and the task head stay with the data party."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The part of a model that one party owns.

    Parameters
    ----------
    blocks : tuple[int, ...]
        Indices of the owned blocks, ascending.
    num_blocks : int
        Number of blocks of the whole model.
    embedding : bool
        Whether everything before the first block is owned.
    task_head : bool
        Whether everything after the last block is owned: final norm, pooler, classifier or language-model head.
    """

    blocks: tuple[int, ...]
    num_blocks: int
    embedding: bool
    task_head: bool

    @classmethod
    def whole(cls, num_blocks: int) -> "Segment":
        """Return the unsplit model of `num_blocks` blocks."""
        return cls(blocks=tuple(range(num_blocks)), num_blocks=num_blocks, embedding=True, task_head=True)

    @property
    def gap(self) -> int | None:
        """Index of the first block that is not owned, or None for the whole model."""
        return next((i for i in range(self.num_blocks) if i not in self.blocks), None)

    @property
    def is_whole(self) -> bool:
        """Whether this is the unsplit model."""
        return self.gap is None and self.embedding and self.task_head

    def of_stack(self, num_blocks: int) -> "Segment":
        """Return the same cut of another stack of blocks: as many first and last ones stay with the data party.

        Raises
        ------
        PartitionError
            If that stack is too short for it.
        """
        if self.gap is None:
            return replace(self, blocks=tuple(range(num_blocks)), num_blocks=num_blocks)
        if self.embedding:
            head, tail = self.gap, len(self.blocks) - self.gap
        else:
            head, tail = self.blocks[0], self.num_blocks - 1 - self.blocks[-1]
        mode = Mode.HBT if self.embedding is self.task_head else Mode.HT
        plan = PartitionPlan(mode=mode, head_blocks=head, tail_blocks=tail)
        return plan.data_party(num_blocks) if self.embedding else plan.model_party(num_blocks)

    def describe(self) -> str:
        """Say what is owned in words, for reports: ``"embedding, block 0, block 5, task head"``."""
        runs: list[list[int]] = []
        for index in self.blocks:
            if runs and runs[-1][-1] == index - 1:
                runs[-1].append(index)
            else:
                runs.append([index])
        words = ["embedding"] if self.embedding else []
        words += [f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]}-{run[-1]}" for run in runs]
        words += ["task head"] if self.task_head else []
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class PartitionPlan:
    """A cut, not yet held against a model.

    Parameters
    ----------
    mode : Mode
        Head-Tail or Head-Body-Tail.
    head_blocks : int
        Number of first blocks that stay with the data party.
    tail_blocks : int
        Number of last blocks that stay with the data party; 0 in Head-Tail.

    Raises
    ------
    PartitionError
        If a count is negative, or a tail is asked for in Head-Tail.
    """

    mode: Mode = Mode.HBT
    head_blocks: int = 1
    tail_blocks: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", parse_mode(self.mode))
        for name in ("head_blocks", "tail_blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise PartitionError(f"{name} is {value!r}; it counts blocks. Choose a whole number of 0 or more.")
        if self.mode is Mode.HT and self.tail_blocks:
            raise PartitionError(
                f"tail_blocks is {self.tail_blocks}, but in Head-Tail the model party owns everything after the head. "
                "Set tail_blocks to 0, or the mode to HBT."
            )

    def data_party(self, num_blocks: int) -> Segment:
        """Return what a data party owns of a model of `num_blocks` blocks, or raise PartitionError."""
        body = self._body(num_blocks)
        own = tuple(i for i in range(num_blocks) if i not in body)
        return Segment(blocks=own, num_blocks=num_blocks, embedding=True, task_head=self.mode is Mode.HBT)

    def model_party(self, num_blocks: int) -> Segment:
        """Return what the model party owns of a model of `num_blocks` blocks, or raise PartitionError."""
        return Segment(
            blocks=tuple(self._body(num_blocks)),
            num_blocks=num_blocks,
            embedding=False,
            task_head=self.mode is Mode.HT,
        )

    def _body(self, num_blocks: int) -> range:
        body = range(self.head_blocks, num_blocks - self.tail_blocks)
        if not body:
            asked = f"head_blocks is {self.head_blocks}"
            if self.mode is Mode.HBT:
                asked += f" and tail_blocks is {self.tail_blocks}"
            raise PartitionError(
                f"{asked}, but the model has {num_blocks} blocks; the model party would hold none. "
                f"Choose head_blocks + tail_blocks < {num_blocks}."
            )
        return body


def parse_mode(value: str) -> Mode:
    """Return the mode that `value` names; raise PartitionError for anything else."""
    try:
        return Mode(value)
    except ValueError:
        raise PartitionError(
            f"the partition mode is {value!r}; known are {', '.join(repr(m.value) for m in Mode)}. "
            "HBT (Head-Body-Tail) keeps labels and the task head with the data party."
        ) from None
