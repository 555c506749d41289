"""Masking: the shares of the paper, the same whenever repeated, and never a special token."""

import pytest

from tests.tasks.words import characters
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks import IGNORED, EncodedText, Row, encode_texts, mask_tokens

TOKENIZER = characters(cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def test_shares_are_those_of_the_paper():
    rows = encode_texts([Row("abcdefghij" * 20, 0, str(i)) for i in range(100)], TOKENIZER, max_tokens=256)
    masked = mask_tokens(rows, TOKENIZER, seed=1, party="a", step=0)
    chosen = kept = hidden = 0
    for before, after in zip(rows, masked, strict=True):
        for true, shown, label in zip(before.input_ids, after.input_ids, after.labels, strict=True):
            if label == IGNORED:
                assert shown == true
                continue
            assert label == true
            assert true not in TOKENIZER.all_special_ids
            chosen += 1
            hidden += shown == TOKENIZER.mask_token_id
            kept += shown == true
            assert shown == TOKENIZER.mask_token_id or shown not in TOKENIZER.all_special_ids
    assert chosen / (100 * 200) == pytest.approx(0.15, abs=0.01)
    assert hidden / chosen == pytest.approx(0.8, abs=0.03)
    assert kept / chosen == pytest.approx(0.1, abs=0.03)


def test_masks_depend_on_seed_party_step_and_row_alone():
    rows = encode_texts([Row("abcdefghij" * 4, 0, str(i)) for i in range(6)], TOKENIZER, max_tokens=64)

    def made(seed=1, party="a", step=3, of=rows):
        return mask_tokens(of, TOKENIZER, seed=seed, party=party, step=step)

    assert made() == made()
    assert made(of=rows[::-1]) == made()[::-1]
    assert made(of=rows[2:4]) == made()[2:4]
    others = [made(), made(seed=2), made(party="b"), made(step=4)]
    assert len({tuple(one) for one in others}) == 4


def test_a_short_row_still_asks_for_something_and_an_empty_one_is_refused():
    short = encode_texts([Row("a", 0, str(i)) for i in range(30)], TOKENIZER, max_tokens=8)
    assert all(set(row.labels) != {IGNORED} for row in mask_tokens(short, TOKENIZER, seed=0, party="a", step=0))
    with pytest.raises(DataError, match="special tokens only"):
        mask_tokens([EncodedText((2, 3), (IGNORED, IGNORED), "x")], TOKENIZER, seed=0, party="a", step=0)
    with pytest.raises(ConfigurationError, match="no mask token"):
        mask_tokens(short, characters(), seed=0, party="a", step=0)
    with pytest.raises(ConfigurationError, match="share is 15"):
        mask_tokens(short, TOKENIZER, seed=0, party="a", step=0, share=15)
    with pytest.raises(ConfigurationError, match="step is -1"):
        mask_tokens(short, TOKENIZER, seed=0, party="a", step=-1)
