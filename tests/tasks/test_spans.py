"""Windows over contexts and back: every answer in the context is found again, and nothing outside of it ever is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tasks.words import bert, characters, gpt2
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks import Span, SpanRow, best_spans, collate, encode_spans, normal_answer, unpadded

TOKENIZER = characters(types=True, cls_token="[CLS]", sep_token="[SEP]")


def pointing(windows):
    """Return logits that point at the answer of each window, less surely at "no answer"."""
    starts, ends = [], []
    for window in windows:
        for logits, place in ((starts, window.start_position), (ends, window.end_position)):
            logits.append(torch.zeros(len(window.input_ids)))
            logits[-1][place] = 1.0 if place == window.no_answer else 5.0
    return starts, ends


@given(context=st.text(alphabet="abc de\n", min_size=1, max_size=80), data=st.data())
def test_every_answer_is_found_again(context, data):
    start = data.draw(st.integers(0, len(context) - 1))
    text = context[start : start + data.draw(st.integers(1, 6))]
    row = SpanRow("why?", context, (Span(text, start),), "x")
    for tokenizer in (TOKENIZER, characters(start=False, end=False)):
        windows = encode_spans([row], tokenizer, max_tokens=24, doc_stride=8)
        assert all(len(window.input_ids) <= 24 for window in windows)
        held = [window for window in windows if window.start_position != window.no_answer]
        assert held, "an answer shorter than the stride lies whole in some window"
        for window in held:
            first, last = window.offsets[window.start_position], window.offsets[window.end_position]
            assert context[first[0] : last[1]] == text
        assert best_spans([row], windows, *pointing(windows))["x"].text == text.strip()
        # Every character of the context is in some window.
        seen = {c for window in windows for o in window.offsets if o is not None for c in range(*o)}
        assert seen == set(range(len(context)))


def test_windows_share_the_stride_and_each_starts_with_the_question():
    row = SpanRow("q?", "abcdefghijklmnopqrstuvwxyz", (Span("xyz", 23),), "x")
    windows = encode_spans([row], TOKENIZER, max_tokens=15, doc_stride=4)
    inside = [[o for o in window.offsets if o is not None] for window in windows]
    assert [(one[0][0], one[-1][1]) for one in inside] == [(0, 10), (6, 16), (12, 22), (18, 26)]
    assert [window.start_position == window.no_answer == 0 for window in windows] == [True, True, True, False]
    assert {window.input_ids[:4] for window in windows} == {windows[0].input_ids[:4]}
    assert windows[0].token_type_ids == (0,) * 4 + (1,) * 11


def test_the_first_of_equal_texts_is_not_the_answer_if_the_row_says_another():
    row = SpanRow("q?", "ab ab ab", (Span("ab", 3),), "x")
    (window,) = encode_spans([row], TOKENIZER, max_tokens=32, doc_stride=8)
    assert window.offsets[window.start_position] == (3, 4)
    assert best_spans([row], [window], *pointing([window]))["x"].start == 3


def test_best_spans_keep_to_the_rules():
    row = SpanRow("q?", "abcdef", (), "x")
    (window,) = encode_spans([row], TOKENIZER, max_tokens=32, doc_stride=8)
    first = next(place for place, o in enumerate(window.offsets) if o is not None)
    start, end = torch.zeros(len(window.input_ids)), torch.zeros(len(window.input_ids))
    start[1], end[2] = 90.0, 90.0  # in the question
    start[first + 3], end[first + 1] = 9.0, 9.0  # ends before it starts
    start[first], end[first + 5] = 8.0, 8.5
    found = best_spans([row], [window], [start], [end], max_answer_tokens=3)["x"]
    assert (found.text, found.start, found.score) == ("def", 3, 17.5)
    assert best_spans([row], [window], [start], [end], max_answer_tokens=2)["x"].text == "ab"
    assert best_spans([row], [window], [start], [end], n_best=1)["x"].text == ""
    start[0], end[0] = 10.0, 10.0
    assert best_spans([row], [window], [start], [end], no_answer_margin=0.0)["x"].start == -1
    assert best_spans([row], [window], [start], [end], no_answer_margin=4.0)["x"].text == "def"


def test_a_row_is_unanswerable_only_if_no_window_answers():
    row = SpanRow("q?", "abcdefghijklmnopqrstuvwxyz", (), "x")
    windows = encode_spans([row], TOKENIZER, max_tokens=20, doc_stride=4)
    assert {(w.start_position, w.end_position) for w in windows} == {(0, 0)}
    starts, ends = pointing(windows)
    assert best_spans([row], windows, starts, ends, no_answer_margin=0.0)["x"].text == ""
    starts[1][10] = ends[1][11] = 9.0
    starts[1][0] = -9.0
    assert best_spans([row], windows, starts, ends, no_answer_margin=0.0)["x"].start >= 0


def test_padding_is_taken_off_on_either_side():
    rows = [SpanRow("q?", "ab cd", (Span("cd", 3),), "x"), SpanRow("q?", "abcdefgh", (Span("ab", 0),), "y")]
    windows = encode_spans(rows, TOKENIZER, max_tokens=32, doc_stride=8)
    for side in ("left", "right"):
        batch = collate(windows, pad_token_id=0, padding_side=side)
        starts = torch.nn.functional.one_hot(batch.inputs["start_positions"], batch.input_ids.shape[1]).float()
        ends = torch.nn.functional.one_hot(batch.inputs["end_positions"], batch.input_ids.shape[1]).float()
        found = best_spans(rows, windows, unpadded(starts, batch.attention_mask), unpadded(ends, batch.attention_mask))
        assert {row_id: span.text for row_id, span in found.items()} == {"x": "cd", "y": "ab"}


def test_what_cannot_be_encoded_or_read_is_refused():
    row = SpanRow("q?", "abc", (Span("x", 0),), "r")
    with pytest.raises(DataError, match="'x' should start at character 0 of the context, but 'a' stands there"):
        encode_spans([row], TOKENIZER, max_tokens=32, doc_stride=4)
    good = SpanRow("q?", "abc", (Span("b", 1),), "r")
    with pytest.raises(ConfigurationError, match="doc_stride is 40"):
        encode_spans([good], TOKENIZER, max_tokens=32, doc_stride=40)
    windows = encode_spans([good], TOKENIZER, max_tokens=32, doc_stride=4)
    with pytest.raises(DataError, match="1 windows, 0 start"):
        best_spans([good], windows, [], [])
    with pytest.raises(DataError, match="Take off the padding"):
        best_spans([good], windows, [torch.zeros(30)], [torch.zeros(30)])
    with pytest.raises(DataError, match="not among the rows"):
        best_spans([], windows, *pointing(windows))


def test_long_questions_are_cut():
    row = SpanRow("abcdefghij", "klmno", (), "x")
    (window,) = encode_spans([row], TOKENIZER, max_tokens=20, doc_stride=2, max_question_tokens=3)
    assert "".join(TOKENIZER.convert_ids_to_tokens(list(window.input_ids))) == "[CLS]abc[SEP]klmno[SEP]"


@pytest.mark.parametrize("make", [bert, gpt2])
def test_offsets_count_characters_not_bytes(make, shared):
    context = "Żółw — a “turtle” — naps 🙂 near Łódź every day."
    row = SpanRow("Where does it nap?", context, (Span("near Łódź", context.index("near")),), "x")
    windows = encode_spans([row], make(shared), max_tokens=64, doc_stride=8)
    found = best_spans([row], windows, *pointing(windows))["x"]
    assert normal_answer(found.text) == normal_answer("near Łódź")
    assert found.start == context.index("near")
