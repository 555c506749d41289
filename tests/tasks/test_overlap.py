"""Overlap metrics against the official definitions, worked out by hand."""

import numpy as np
import pytest
from sacrebleu import corpus_bleu as official_bleu

from vflair_flower.errors import DataError
from vflair_flower.tasks import exact_match, normal_answer, normal_vqa, rouge, span_f1, vqa_agreement
from vflair_flower.tasks.overlap import corpus_bleu


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("an  apple,\ta day.", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("the", ""),
        ("$1,000", "1000"),
        ("Żółw", "żółw"),
    ],
)
def test_squad_normalisation(text, normal):
    assert normal_answer(text) == normal


def test_squad_scores():
    wanted = ["Denver Broncos", "The Denver Broncos", "Broncos"]
    assert exact_match("the denver broncos!", wanted)
    assert not exact_match("Denver", wanted)
    assert span_f1("Denver", wanted) == pytest.approx(2 / 3)
    assert span_f1("Carolina Panthers", wanted) == 0.0
    # Repeated words are shared as often as both have them: 2 of 3 and 2 of 2.
    assert span_f1("b b c", ["b b"]) == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    # No answer.
    assert exact_match("", [])
    assert span_f1("", []) == 1.0
    assert span_f1("something", []) == 0.0


def test_rouge_by_hand():
    reference, said = "the cat sat on the mat", "the cat lay on the mat"
    assert rouge("rouge1", said, [reference]) == pytest.approx(5 / 6)
    assert rouge("rouge2", said, [reference]) == pytest.approx(3 / 5)
    assert rouge("rougeL", said, [reference]) == pytest.approx(5 / 6)
    assert rouge("rougeL", "mat the on", [reference]) == pytest.approx(2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6))
    assert rouge("rouge1", said, ["nothing", reference]) == pytest.approx(5 / 6)
    assert rouge("rouge1", "", [reference]) == 0.0


def test_bleu_is_sacrebleus_on_the_whole_and_on_any_part():
    said = ["the dog bit the man .", "it was not unexpected .", "the man bit him first .", "a short one"]
    first = ["The dog bit the man .", "It was not unexpected .", "The man bit him first .", "a rather short one"]
    second = ["The dog had bit the man .", "No one was surprised .", "The man had bitten the dog .", "one, short"]
    found = corpus_bleu(said, list(zip(first, second, strict=True)))
    assert found(np.arange(4)) == pytest.approx(official_bleu(said, [first, second]).score)
    assert found(np.asarray([0, 2])) == pytest.approx(
        official_bleu([said[0], said[2]], [[first[0], first[2]], [second[0], second[2]]]).score
    )
    with pytest.raises(DataError, match="needs a reference"):
        corpus_bleu(["a"], [()])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A Dog.", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("dont walk", "don't walk"),
        ("theyre here", "they're here"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("black-and-white", "black and white"),
        ("black - white", "black white"),
        ("yes!", "yes"),
        ("the\nbus", "bus"),
        ("coca-cola (zero)", "coca-cola 0".replace("-", " ")),
    ],
)
def test_vqa_normalisation(text, normal):
    assert normal_vqa(text) == normal


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_agreement_is_averaged_over_leaving_one_out(matches, expected):
    # n people of ten agree: n times min((n - 1) / 3, 1) and 10 - n times min(n / 3, 1), over ten.
    assert vqa_agreement("Stop", ["stop"] * matches + ["go"] * (10 - matches)) == pytest.approx(expected)


def test_vqa_needs_several_people():
    with pytest.raises(DataError, match="1 answers"):
        vqa_agreement("a", ["a"])
