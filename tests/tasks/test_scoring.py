"""Scores by name: the libraries' values, baselines and intervals, and no metric for answers of another kind."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks import (
    CATALOGUE,
    METRICS,
    Likelihood,
    PromptRow,
    Score,
    Span,
    SpanRow,
    mean_interval,
    score_classes,
    score_likelihoods,
    score_numbers,
    score_texts,
    scoring,
)


def test_classes_have_chance_majority_and_interval():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=300)
    said = np.where(rng.random(300) < 0.8, labels, 1 - labels)
    scores = score_classes(
        ["accuracy", "f1", "mcc"], said.tolist(), labels.tolist(), num_labels=2, train_labels=[1, 1, 0]
    )
    accuracy, f1, mcc = scores
    assert accuracy.value == (said == labels).mean()
    assert (accuracy.chance, accuracy.majority) == (0.5, labels.mean())
    assert f1.value == f1_score(labels, said)
    assert f1.majority == pytest.approx(2 * labels.mean() / (labels.mean() + 1))
    assert mcc.value == pytest.approx(matthews_corrcoef(labels, said))
    assert (mcc.chance, mcc.majority) == (0.0, 0.0)
    for score in scores:
        assert score.count == 300
        assert score.interval.low < score.value < score.interval.high
    again = score_classes(["mcc"], said.tolist(), labels.tolist(), num_labels=2)[0]
    assert again.interval == mcc.interval
    assert again.majority is None


def test_matthews_correlation_by_hand():
    # 4 true positives, 3 true negatives, 1 false positive, 2 false negatives.
    labels = [1] * 4 + [0] * 3 + [0] + [1] * 2
    said = [1] * 4 + [0] * 3 + [1] + [0] * 2
    (score,) = score_classes(["mcc"], said, labels, num_labels=2)
    assert score.value == pytest.approx((4 * 3 - 1 * 2) / math.sqrt(5 * 6 * 4 * 5))


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30), k=st.sampled_from([2, 4])
)
def test_the_quick_figures_are_scikit_learns(rows, k):
    true, said = np.asarray(rows).T % k
    table = np.bincount(true * k + said, minlength=k * k).reshape(k, k)
    assert scoring._mcc_of_table(table) == pytest.approx(scoring._mcc(true, said, k))
    assert scoring._f1_of_table(table) == pytest.approx(scoring._f1(true, said, k))


def test_f1_of_more_than_two_classes_is_macro_over_all_of_them():
    (score,) = score_classes(["f1"], [0, 1, 1], [0, 1, 2], num_labels=4)
    assert score.value == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)


def test_numbers_are_correlated():
    rng = np.random.default_rng(1)
    true = rng.random(100) * 5
    said = true + rng.normal(size=100)
    pearson, spearman = score_numbers(["pearson", "spearman"], said.tolist(), true.tolist())
    assert pearson.value == pytest.approx(stats.pearsonr(said, true)[0])
    assert spearman.value == pytest.approx(stats.spearmanr(said, true)[0])
    assert pearson.interval.low < pearson.value < pearson.interval.high
    flat = score_numbers(["pearson"], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0])[0]
    assert (flat.value, flat.note) == (0.0, "not defined (all equal), counted as 0")
    with pytest.raises(DataError, match="all finite"):
        score_numbers(["pearson"], [1.0, float("nan")], [1.0, 2.0])


def test_texts_go_to_their_metrics():
    rows = [
        PromptRow("q", " 3 + 4 = 7\n#### 7", "a"),
        PromptRow("q", " so\n#### 1,000", "b"),
        PromptRow("q", "#### 5", "c"),
        PromptRow("q", "#### 5", "d"),
    ]
    (gsm8k,) = score_texts(["gsm8k_accuracy"], ["#### 7.0", "it is 1000", "it is 6", "who knows"], rows)
    assert gsm8k.value == 0.5
    assert gsm8k.note == "2 answers without #### were read by their last number, 1 have no number"
    boxed = [PromptRow("q", r"so \boxed{\frac12}", "a"), PromptRow("q", r"\boxed{3}", "b")]
    (maths,) = score_texts(["math_accuracy"], [r"\boxed{0.5}", "3"], boxed)
    assert (maths.value, maths.note) == (0.5, "1 answers have no box")
    spans = [SpanRow("q", "in Paris, France", (Span("Paris", 3), Span("Paris, France", 3)), "a")]
    exact, f1 = score_texts(["exact_match", "span_f1"], ["Paris France"], spans)
    assert (exact.value, f1.value) == (1.0, 1.0)
    seen = [PromptRow("q", " stop", "a", references=("stop",) * 3 + ("go",) * 7)]
    assert score_texts(["vqa_accuracy"], ["Stop!"], seen)[0].value == pytest.approx(0.9)
    told = [PromptRow("q", "the cat sat on the mat", "a"), PromptRow("q", "x y z", "b")]
    rouge1, bleu = score_texts(["rouge1", "bleu"], ["the cat sat on the mat", "x y"], told)
    assert rouge1.value == pytest.approx((1 + 0.8) / 2)
    assert 0 < bleu.value < 100
    assert bleu.interval.low <= bleu.value <= bleu.interval.high


def test_perplexities_by_hand():
    found = [Likelihood(2.0, 2, True, "a"), Likelihood(4.0, 1, False, "b"), Likelihood(0.0, 1, True, "c")]
    word, token, last = score_likelihoods(["word_perplexity", "token_perplexity", "last_word_accuracy"], found)
    assert word.value == pytest.approx(math.exp(6 / 3))
    assert token.value == pytest.approx(math.exp(6 / 4))
    assert last.value == pytest.approx(2 / 3)
    assert (word.note, token.note) == ("3 units", "4 units")


def test_equal_values_are_not_certainty():
    assert mean_interval([1.0] * 10, seed=0).low == pytest.approx(0.025**0.1)
    half = mean_interval([0.5] * 10, seed=0)
    assert half.low == pytest.approx(0.5 - math.sqrt(math.log(40) / 20))
    assert mean_interval([0.5], seed=0).high == 1.0
    assert mean_interval([0.2, 0.9, 0.4], seed=0).method.startswith("percentile bootstrap")
    with pytest.raises(DataError, match=r"all in 0\.\.1"):
        mean_interval([1.5], seed=0)
    with pytest.raises(DataError, match="There are 0 values"):
        mean_interval([], seed=0)


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (lambda: score_classes(["bleu"], [1], [1], num_labels=2), ConfigurationError, "'bleu' is not one of classes"),
        (lambda: score_texts(["mcc"], ["a"], [PromptRow("", "a", "x")]), ConfigurationError, "not one of texts"),
        (lambda: score_numbers(["f1"], [1.0], [1.0]), ConfigurationError, "not one of numbers"),
        (lambda: score_likelihoods(["rouge1"], []), ConfigurationError, "not one of likelihoods"),
        (lambda: score_classes(["mcc"], [1], [], num_labels=2), DataError, "1 predictions and 0 rows"),
        (lambda: score_classes(["f1"], [2], [1], num_labels=2), DataError, "Classes are 0..1, but 2 to 2"),
        (lambda: score_texts(["bleu"], [], []), DataError, "0 predictions and 0 rows"),
        (lambda: Score(name="x", value=math.inf, count=3, interval=mean_interval([0.1, 0.2], seed=0)), DataError,
         "x is inf from 3 rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(call, error, expected):
    with pytest.raises(error, match=expected):
        call()


def test_every_metric_of_the_catalogue_is_known():
    assert {name for entry in CATALOGUE.values() for name in entry.metrics} == set(METRICS)
