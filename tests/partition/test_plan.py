"""Plans: who owns which blocks, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vflair_flower.errors import ConfigurationError, PartitionError
from vflair_flower.partition import Mode, PartitionPlan, Segment


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"head_blocks": -1}, "head_blocks is -1"),
        ({"tail_blocks": -2}, "tail_blocks is -2"),
        ({"head_blocks": 1.5}, "head_blocks is 1.5"),
        ({"tail_blocks": True}, "tail_blocks is True"),
        ({"head_blocks": "1"}, "head_blocks is '1'"),
        ({"mode": "TBH"}, "'TBH'.*'HT', 'HBT'"),
        ({"mode": Mode.HT, "tail_blocks": 1}, "tail_blocks is 1.*Set tail_blocks to 0"),
    ],
)
def test_bad_counts_are_refused_at_birth(settings: dict, said: str) -> None:
    with pytest.raises(PartitionError, match=said):
        PartitionPlan(**settings)


@pytest.mark.parametrize(("head", "tail", "blocks"), [(4, 0, 4), (2, 2, 4), (3, 2, 4), (1, 0, 1), (9, 0, 4), (0, 4, 4)])
@pytest.mark.parametrize("side", ["data_party", "model_party"])
def test_cuts_that_leave_no_body_are_refused(head: int, tail: int, blocks: int, side: str) -> None:
    plan = PartitionPlan(head_blocks=head, tail_blocks=tail)
    with pytest.raises(PartitionError, match=rf"head_blocks is {head} and tail_blocks is {tail}.*has {blocks} blocks"):
        getattr(plan, side)(blocks)


def test_head_tail_message_does_not_speak_of_a_tail() -> None:
    with pytest.raises(PartitionError, match=r"^head_blocks is 4, but the model has 4 blocks"):
        PartitionPlan(mode="HT", head_blocks=4, tail_blocks=0).model_party(4)


def test_plan_errors_are_configuration_errors_and_modes_are_parsed() -> None:
    assert issubclass(PartitionError, ConfigurationError)
    assert PartitionPlan(mode="HT", tail_blocks=0).mode is Mode.HT


@given(head=st.integers(0, 6), tail=st.integers(0, 6), body=st.integers(1, 6), mode=st.sampled_from(Mode))
def test_every_part_has_exactly_one_owner(head: int, tail: int, body: int, mode: Mode) -> None:
    tail = 0 if mode is Mode.HT else tail
    plan = PartitionPlan(mode=mode, head_blocks=head, tail_blocks=tail)
    blocks = head + body + tail
    own, theirs = plan.data_party(blocks), plan.model_party(blocks)
    assert sorted(own.blocks + theirs.blocks) == list(range(blocks))
    assert (own.embedding, theirs.embedding) == (True, False)
    assert own.task_head != theirs.task_head
    assert own.task_head is (mode is Mode.HBT)
    assert own.gap == head
    assert not own.is_whole
    assert not theirs.is_whole


@pytest.mark.parametrize(
    ("segment", "said"),
    [
        (
            Segment(blocks=(0, 5), num_blocks=6, embedding=True, task_head=True),
            "embedding, block 0, block 5, task head",
        ),
        (Segment(blocks=(1, 2, 3), num_blocks=6, embedding=False, task_head=False), "blocks 1-3"),
        (
            Segment(blocks=(0, 1, 3, 4), num_blocks=6, embedding=True, task_head=False),
            "embedding, blocks 0-1, blocks 3-4",
        ),
        (Segment(blocks=(), num_blocks=2, embedding=True, task_head=True), "embedding, task head"),
    ],
)
def test_describe(segment: Segment, said: str) -> None:
    assert segment.describe() == said


def test_whole_segment() -> None:
    whole = Segment(blocks=(0, 1), num_blocks=2, embedding=True, task_head=True)
    assert whole.is_whole
    assert whole.gap is None
