"""Batches: padding by hand, every row once per epoch, and the same batches after a restart."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks import BatchOrder, EncodedRow, Row, collate, encode, padding_token_id

VOCABULARY = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "where", "is", "it"])}


def make_tokenizer(*, special: bool = True, **tokens: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.normalizer = normalizers.Replace("\u200b", " ")
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


ROWS = [Row("where is it", 2, "a"), Row("it is", 0, "b")]
ENCODED = [EncodedRow((2, 4, 5, 6, 3), 2, "a"), EncodedRow((2, 6, 5, 3), 0, "b")]


def test_encode_adds_special_tokens_and_cuts_off() -> None:
    tokenizer = make_tokenizer(pad_token="[PAD]")
    assert encode(ROWS, tokenizer, max_tokens=8) == ENCODED
    assert [len(row.input_ids) for row in encode(ROWS, tokenizer, max_tokens=4)] == [4, 4]
    assert encode([], tokenizer, max_tokens=8) == []


@pytest.mark.parametrize("max_tokens", [-1, 0, 2])
def test_encode_refuses_a_length_without_room_for_text(max_tokens: int) -> None:
    with pytest.raises(ConfigurationError, match=f"max_tokens is {max_tokens}, but this tokenizer adds 2"):
        encode(ROWS, make_tokenizer(), max_tokens=max_tokens)


def test_encode_refuses_a_text_without_tokens() -> None:
    with pytest.raises(DataError, match=r"Row 'z' has the text '\\u200b'"):
        encode([Row("\u200b", 0, "z")], make_tokenizer(special=False), max_tokens=8)


def test_collate_pads_to_the_longest_on_either_side() -> None:
    batch = collate(ENCODED, pad_token_id=0)
    assert batch.input_ids.tolist() == [[2, 4, 5, 6, 3], [2, 6, 5, 3, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.labels.tolist() == [2, 0]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}
    left = collate(ENCODED, pad_token_id=9, padding_side="left", pad_to_multiple_of=4)
    assert left.input_ids.tolist() == [[9, 9, 9, 2, 4, 5, 6, 3], [9, 9, 9, 9, 2, 6, 5, 3]]
    assert left.attention_mask.sum(dim=1).tolist() == [5, 4]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    side=st.sampled_from(["left", "right"]),
    multiple=st.none() | st.integers(1, 8),
)
def test_collate_loses_and_adds_no_token(lengths: list[int], side: str, multiple: int | None) -> None:
    encoded = [EncodedRow(tuple(range(1, length + 1)), index, str(index)) for index, length in enumerate(lengths)]
    batch = collate(encoded, pad_token_id=0, padding_side=side, pad_to_multiple_of=multiple)
    assert batch.input_ids.shape[1] % (multiple or 1) == 0
    assert batch.input_ids.shape[1] - max(lengths) < (multiple or 1)
    for row, ids, mask in zip(encoded, batch.input_ids, batch.attention_mask, strict=True):
        assert tuple(ids[mask == 1].tolist()) == row.input_ids
        assert not ids[mask == 0].any()


def test_collate_refuses_what_makes_no_batch() -> None:
    with pytest.raises(DataError, match="0 rows"):
        collate([], pad_token_id=0)
    with pytest.raises(ConfigurationError, match="padding_side is 'up'"):
        collate(ENCODED, pad_token_id=0, padding_side="up")
    with pytest.raises(ConfigurationError, match="pad_to_multiple_of is 0"):
        collate(ENCODED, pad_token_id=0, pad_to_multiple_of=0)


def test_the_padding_token_falls_back_to_eos_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert padding_token_id(make_tokenizer(pad_token="[PAD]", eos_token="[SEP]")) == 0
    assert not caplog.records
    with caplog.at_level(logging.INFO):
        assert padding_token_id(make_tokenizer(eos_token="[SEP]")) == 3
    assert "'[SEP]' stands in" in caplog.text
    with pytest.raises(ConfigurationError, match="neither a pad nor an eos token"):
        padding_token_id(make_tokenizer())


@given(
    num_rows=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**64), epoch=st.integers(0, 1000)
)
def test_each_epoch_visits_every_row_once(num_rows: int, batch_size: int, seed: int, epoch: int) -> None:
    order = BatchOrder(num_rows=num_rows, batch_size=batch_size, seed=seed, party="north")
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = [order.indices(step) for step in steps]
    assert sorted(index for batch in batches for index in batch) == list(range(num_rows))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    # A pure function: asked again, backwards and by an equal object, it answers the same.
    again = BatchOrder(num_rows=num_rows, batch_size=batch_size, seed=seed, party="north")
    assert [again.indices(step) for step in reversed(steps)] == batches[::-1]


def test_epochs_parties_and_seeds_have_orders_of_their_own() -> None:
    def first_epoch(seed: int = 0, party: str = "north", epoch: int = 0) -> tuple[int, ...]:
        return tuple(BatchOrder(num_rows=50, batch_size=50, seed=seed, party=party).indices(epoch))

    orders = {first_epoch(), first_epoch(seed=1), first_epoch(party="south"), first_epoch(epoch=1)}
    assert len(orders) == 4


def test_a_resumed_run_gets_the_batches_of_every_earlier_run() -> None:
    # Golden: a checkpoint written by an earlier release continues with these rows.
    order = BatchOrder(num_rows=100, batch_size=7, seed=3, party="north")
    assert order.indices(40) == [67, 83, 31, 71, 41, 13, 68]


@pytest.mark.parametrize(("setting", "value"), [("num_rows", 0), ("batch_size", 0), ("seed", -1)])
def test_an_order_validates_at_birth(setting: str, value: int) -> None:
    good = {"num_rows": 3, "batch_size": 2, "seed": 0, "party": "north"}
    with pytest.raises(ConfigurationError, match=rf"{setting} is {value} for party 'north'"):
        BatchOrder(**(good | {setting: value}))


def test_steps_count_from_zero() -> None:
    with pytest.raises(ConfigurationError, match="step is -1"):
        BatchOrder(num_rows=3, batch_size=2, seed=0, party="north").indices(-1)


@given(num_rows=st.integers(1, 90), batch_size=st.integers(1, 9), epoch=st.integers(0, 3), seed=st.integers(0, 5))
def test_grouping_by_length_visits_every_row_once_and_saves_padding(num_rows, batch_size, epoch, seed):
    lengths = tuple(torch.randint(1, 60, (num_rows,), generator=torch.Generator().manual_seed(seed)).tolist())
    orders = [
        BatchOrder(num_rows=num_rows, batch_size=batch_size, seed=seed, party="a", lengths=known)
        for known in ((), lengths)
    ]
    steps = range(epoch * orders[0].steps_per_epoch, (epoch + 1) * orders[0].steps_per_epoch)
    plain, grouped = ([order.indices(step) for step in steps] for order in orders)
    assert sorted(i for batch in grouped for i in batch) == list(range(num_rows))
    assert [len(batch) for batch in plain] == [len(batch) for batch in grouped]
    if num_rows >= 40 and batch_size >= 4:
        padded = [sum(len(b) * max(lengths[i] for i in b) for b in batches) for batches in (plain, grouped)]
        assert padded[1] < padded[0]


def test_lengths_of_another_number_of_rows_are_refused():
    with pytest.raises(ConfigurationError, match="3 lengths for 4 rows"):
        BatchOrder(num_rows=4, batch_size=2, seed=0, party="a", lengths=(1, 2, 3))
