"""Encoding by hand: pairs, prompts and responses, targets; what is cut, what is masked, what is refused."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tasks.words import bert, characters, gpt2
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.settings import TaskKind
from vflair_flower.tasks import (
    IGNORED,
    EncodedPair,
    EncodedRow,
    EncodedText,
    EncodedWindow,
    NumberRow,
    PromptRow,
    Row,
    Span,
    SpanRow,
    collate,
    encode,
    encode_pairs,
    encode_prompts,
    encode_responses,
    encode_task,
    end_token_id,
    likelihoods,
    mask_token_id,
    prompt_tokens,
)


class TestTexts:
    def test_two_texts_are_told_apart_by_separator_and_type(self):
        tokenizer = characters(types=True, sep_token="[SEP]", cls_token="[CLS]")
        (row,) = encode([Row("ab", 1, "x", pair="c")], tokenizer, max_tokens=16)
        assert tokenizer.convert_ids_to_tokens(list(row.input_ids)) == ["[CLS]", "a", "b", "[SEP]", "c", "[SEP]"]
        assert row.token_type_ids == (0, 0, 0, 0, 1, 1)
        single = encode([Row("ab", 1, "x")], tokenizer, max_tokens=16)
        assert single[0].token_type_ids == ()
        batch = collate([row, *single], pad_token_id=0, padding_side="left")
        assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]

    def test_without_a_separator_the_second_text_starts_a_line(self):
        tokenizer = characters(start=False, end=False)
        (row,) = encode([Row("ab", 1, "x", pair="cd")], tokenizer, max_tokens=16)
        assert tokenizer.decode(list(row.input_ids)) == "ab\ncd"

    def test_of_two_texts_the_longer_is_cut(self):
        tokenizer = characters(sep_token="[SEP]", cls_token="[CLS]")
        (row,) = encode([Row("abcdefgh", 1, "x", pair="yz")], tokenizer, max_tokens=8)
        assert tokenizer.convert_ids_to_tokens(list(row.input_ids))[1:4] == ["a", "b", "c"]
        assert tokenizer.convert_ids_to_tokens(list(row.input_ids))[5:7] == ["y", "z"]
        with pytest.raises(ConfigurationError, match="max_tokens is 4, but this tokenizer adds 3"):
            encode([Row("ab", 1, "x", pair="c")], tokenizer, max_tokens=4)

    def test_numbers_become_float_labels(self):
        rows = encode([NumberRow("a", 3, "x", pair="b"), NumberRow("a", 2.5, "y")], characters(), max_tokens=9)
        assert collate(rows, pad_token_id=0).labels.tolist() == [3.0, 2.5]
        assert collate(rows, pad_token_id=0).labels.dtype == torch.float32
        assert (
            collate(encode([Row("a", 3, "x")], characters(), max_tokens=9), pad_token_id=0).labels.dtype == torch.int64
        )

    def test_what_a_tokenizer_lacks_is_named(self):
        with pytest.raises(ConfigurationError, match=r"no eos token.*tokenizer\.eos_token"):
            end_token_id(characters(eos_token=""))
        with pytest.raises(ConfigurationError, match="no mask token"):
            mask_token_id(characters())


class TestResponses:
    tokenizer = characters(cls_token="[CLS]", sep_token="[SEP]")

    def text(self, ids):
        return "".join(self.tokenizer.convert_ids_to_tokens([i for i in ids if i != IGNORED]))

    def test_labels_cover_the_response_and_its_end_only(self):
        (row,) = encode_responses([PromptRow("ab:", " cd", "x")], self.tokenizer, max_tokens=16)
        assert self.text(row.input_ids) == "[CLS]ab: cd[SEP]"
        assert self.text(row.labels) == " cd[SEP]"
        assert prompt_tokens(row) == 4
        assert row.labels[:4] == (IGNORED,) * 4
        (open_end,) = encode_responses([PromptRow("ab:", " cd", "x")], self.tokenizer, max_tokens=16, add_end=False)
        assert self.text(open_end.labels) == " cd"

    def test_padding_is_never_a_label_even_where_it_is_the_end_token(self):
        rows = encode_responses([PromptRow("a", "b", "x"), PromptRow("a", "bcde", "y")], self.tokenizer, max_tokens=16)
        for side in ("left", "right"):
            batch = collate(rows, pad_token_id=end_token_id(self.tokenizer), padding_side=side)
            assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()
            assert (batch.labels != IGNORED).sum(1).tolist() == [2, 5]
            assert (batch.input_ids[batch.labels != IGNORED] == batch.labels[batch.labels != IGNORED]).all()

    def test_a_long_prompt_loses_its_start_and_keeps_its_first_token(self, caplog):
        with caplog.at_level(logging.INFO):
            (row,) = encode_responses([PromptRow("abcdefghij", "yz", "x")], self.tokenizer, max_tokens=8)
        assert self.text(row.input_ids) == "[CLS]ghijyz[SEP]"
        assert "cut 1 of 1 prompts at their start and 0 responses" in caplog.text

    def test_a_long_response_keeps_half_and_gets_no_end(self, caplog):
        with caplog.at_level(logging.INFO):
            (row,) = encode_responses([PromptRow("abcdefghij", "qrstuvwxyz", "x")], self.tokenizer, max_tokens=8)
        assert self.text(row.input_ids) == "[CLS]hijqrst"
        assert self.text(row.labels) == "qrst"
        assert "1 responses at their end" in caplog.text

    @given(prompt=st.integers(0, 40), response=st.integers(1, 40), most=st.integers(4, 50))
    def test_some_response_always_stays(self, prompt, response, most):
        (row,) = encode_responses([PromptRow("p" * prompt, "r" * response, "x")], self.tokenizer, max_tokens=most)
        assert len(row.input_ids) == len(row.labels) <= most
        asked = len(row.labels) - prompt_tokens(row)
        assert asked == min(response + 1, max(most - prompt - 1, most // 2))
        assert len(row.input_ids) == min(most, prompt + response + 2)

    def test_an_empty_prompt_models_the_whole_text(self):
        (row,) = encode_responses([PromptRow("", "abc", "x")], self.tokenizer, max_tokens=9)
        assert self.text(row.labels) == "abc[SEP]"

    def test_a_response_without_tokens_is_refused(self):
        with pytest.raises(DataError, match="Row 'x' has the response ''"):
            encode_responses([PromptRow("ab", "", "x")], self.tokenizer, max_tokens=9)
        with pytest.raises(ConfigurationError, match="has no eos token"):
            encode_responses([PromptRow("a", "b", "x")], characters(eos_token=""), max_tokens=9)

    def test_prompts_alone_ask_for_nothing(self):
        (row,) = encode_prompts([PromptRow("abcdef", "z", "x")], self.tokenizer, max_tokens=4)
        assert self.text(row.input_ids) == "[CLS]def"
        assert set(row.labels) == {IGNORED}

    def test_the_prompt_is_what_is_seen_when_writing_and_no_space_is_added(self, shared):
        tokenizer = gpt2(shared)
        (row,) = encode_responses([PromptRow("The answer is", " forty-two", "x")], tokenizer, max_tokens=32)
        assert row.input_ids[: prompt_tokens(row)] == tuple(tokenizer("The answer is")["input_ids"])
        assert tokenizer.decode(list(row.input_ids[:-1])) == "The answer is forty-two"
        # "un" + "happy" would be one token together: the prompt still is what it is when the model writes.
        (merged,) = encode_responses([PromptRow("un", "happy", "x")], tokenizer, max_tokens=32)
        assert merged.input_ids[: prompt_tokens(merged)] == tuple(tokenizer("un")["input_ids"])

    def test_seq2seq_targets_have_their_own_length_and_end_once(self):
        rows = [PromptRow("abcd", "yz", "x"), PromptRow("a", "tuvwxyz", "y")]
        pairs = encode_pairs(rows, self.tokenizer, max_tokens=16, max_target_tokens=5)
        assert self.text(pairs[0].labels) == "[CLS]yz[SEP]"
        assert len(pairs[1].labels) == 5
        batch = collate(pairs, pad_token_id=0, padding_side="left")
        assert batch.input_ids.shape == (2, 6)
        assert batch.labels[0].tolist()[-1] == IGNORED
        with pytest.raises(DataError, match="without any token"):
            encode_pairs(
                [PromptRow("a", "", "x")], characters(start=False, end=False), max_tokens=9, max_target_tokens=9
            )


def test_batches_are_of_one_kind():
    with pytest.raises(DataError, match="starts with a EncodedRow and row 'b' is a EncodedText"):
        collate([EncodedRow((1,), 0, "a"), EncodedText((1,), (1,), "b")], pad_token_id=0)
    windows = [EncodedWindow((7, 8), (None, (0, 1)), 1, 1, 0, "a"), EncodedWindow((7,), (None,), 0, 0, 0, "b")]
    batch = collate(windows, pad_token_id=0, padding_side="left")
    assert batch.inputs["start_positions"].tolist() == [1, 1]
    with pytest.raises(DataError, match="has no labels"):
        print(batch.labels)


@pytest.mark.parametrize(
    ("kind", "row", "made"),
    [
        (TaskKind.SEQUENCE_CLASSIFICATION, Row("a b", 1, "x"), EncodedRow),
        (TaskKind.SEQUENCE_REGRESSION, NumberRow("a b", 1.5, "x"), EncodedRow),
        (TaskKind.QUESTION_ANSWERING, SpanRow("who?", "it is me", (Span("me", 6),), "x"), EncodedWindow),
        (TaskKind.CAUSAL_LM, PromptRow("a", "b", "x"), EncodedText),
        (TaskKind.SEQ2SEQ_LM, PromptRow("a", "b", "x"), EncodedPair),
        (TaskKind.MASKED_LM, Row("a b", 1, "x"), EncodedText),
    ],
)
def test_the_door_encodes_every_kind_and_refuses_rows_of_another(kind, row, made):
    tokenizer = characters(cls_token="[CLS]", sep_token="[SEP]")
    (encoded,) = encode_task(kind, [row], tokenizer, max_tokens=24)
    assert type(encoded) is made
    assert set(collate([encoded], pad_token_id=0).inputs) >= {"input_ids", "attention_mask"}
    if kind is not TaskKind.MASKED_LM:
        other = PromptRow("a", "b", "x") if not isinstance(row, PromptRow) else Row("a", 0, "x")
        with pytest.raises(DataError, match="Load the data set of that task"):
            encode_task(kind, [other], tokenizer, max_tokens=24)
    with pytest.raises(ConfigurationError, match="encode_images"):
        encode_task(TaskKind.IMAGE_TEXT_TO_TEXT, [row], tokenizer, max_tokens=24)


def test_likelihoods_are_those_of_the_loss_whichever_side_is_padded():
    tokenizer = characters(cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    ).eval()  # fmt: skip
    rows = encode_responses([PromptRow("abc", "de", "x"), PromptRow("a", "bcdefg", "y")], tokenizer, max_tokens=32)
    with torch.no_grad():
        alone = [model(**collate([row], pad_token_id=0).inputs).loss for row in rows]
        batch = collate(rows, pad_token_id=0)
        output = model(**batch.inputs)
    found = likelihoods(output.logits, batch)
    assert [one.tokens for one in found] == [3, 7]
    for one, loss in zip(found, alone, strict=True):
        assert one.nll / one.tokens == pytest.approx(float(loss), rel=1e-4)
    assert sum(one.nll for one in found) / 10 == pytest.approx(float(output.loss), rel=1e-5)
    sure = torch.nn.functional.one_hot(batch.input_ids.roll(-1, 1), len(tokenizer)).float() * 50
    assert [one.foreseen for one in likelihoods(sure, batch)] == [True, True]
    # One wrong sub-word, and the whole word is wrong.
    sure[0, 3] = 0.0
    assert [one.foreseen for one in likelihoods(sure, batch)] == [False, True]
    with pytest.raises(DataError, match="asks for no token"):
        likelihoods(
            sure[:1, :4], collate(encode_prompts([PromptRow("abc", "d", "x")], tokenizer, max_tokens=9), pad_token_id=0)
        )


def test_real_pairs_are_as_bert_wants_them(shared):
    tokenizer = bert(shared)
    (row,) = encode([Row("The cat sat.", 0, "x", pair="It sat.")], tokenizer, max_tokens=32)
    assert tokenizer.decode(list(row.input_ids)) == "[CLS] the cat sat. [SEP] it sat. [SEP]"
    assert row.token_type_ids == (0,) * 6 + (1,) * 4
