"""How much two texts share: SQuAD's exact match and F1, ROUGE, BLEU, and VQA's agreement with ten people.

ROUGE is rouge-score's and BLEU is sacrebleu's; what is written out here are the official normalisations, which no
library has without a download.

Invariant: every value per row is in 0..1, and a text compared with itself gets 1 unless nothing is left of it.
"""

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vflair_flower.errors import DataError
from vflair_flower.tasks.scores import Places

# rouge-score and sacrebleu take a second to import, which every party's process would pay, so they wait for their use.
if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normal_answer(text: str) -> str:
    """Return a SQuAD answer as the official script compares it: lower case, no punctuation, articles or extra spaces.

    Examples
    --------
    >>> normal_answer("The  Eiffel-Tower!")
    'eiffeltower'
    """
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(predicted: str, references: Sequence[str]) -> bool:
    """Return whether a prediction equals any of the references, normalised; no reference means "no answer"."""
    return normal_answer(predicted) in {normal_answer(reference) for reference in references or ("",)}


def span_f1(predicted: str, references: Sequence[str]) -> float:
    """Return the largest F1 of shared words with any of the references, normalised.

    Examples
    --------
    >>> span_f1("in the city of Paris", ["Paris", "Paris, France"])
    0.4
    """
    return max(_word_f1(normal_answer(predicted), normal_answer(ref)) for ref in references or ("",))


def _word_f1(predicted: str, reference: str) -> float:
    words, wanted = predicted.split(), reference.split()
    if not words or not wanted:
        return float(words == wanted)
    shared = (Counter(words) & Counter(wanted)).total()
    return 2 * shared / (len(words) + len(wanted))


def rouge(kind: str, predicted: str, references: Sequence[str]) -> float:
    """Return the F-measure of ROUGE, the largest over the references; with rouge-score's stemming.

    Parameters
    ----------
    kind : {"rouge1", "rouge2", "rougeL"}
        Shared words, shared pairs of words, or the longest common subsequence (Lin 2004).
    predicted, references
        The texts.
    """
    return max(float(_scorer(kind).score(reference, predicted)[kind].fmeasure) for reference in references)


@functools.cache
def _scorer(kind: str) -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


def corpus_bleu(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> Callable[[Places], float]:
    """Return a function that gives the BLEU, 0..100, of the rows at some places (Post 2018: 13a tokens, cased).

    Counts are taken once per row, so that a bootstrap adds them up instead of counting again.

    Raises
    ------
    DataError
        A row has no reference.
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)  # quiet for single rows; the corpus figure is made below, as sacrebleu makes it
    counts = []
    for text, wanted in zip(predicted, references, strict=True):
        if not wanted:
            raise DataError("BLEU needs a reference for every row. Leave out the rows without one.")
        row = metric.sentence_score(text, list(wanted))
        counts.append([*row.counts, *row.totals, row.sys_len, row.ref_len])
    table = np.asarray(counts, dtype=np.int64)

    def bleu(places: Places) -> float:
        sums = [int(value) for value in table[places].sum(axis=0)]
        return float(BLEU.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp").score)

    return bleu


def vqa_agreement(predicted: str, answers: Sequence[str]) -> float:
    """Return how many people agree: min(matches / 3, 1), averaged over leaving out each person (Antol et al. 2015).

    Raises
    ------
    DataError
        There are fewer than two people.

    Examples
    --------
    >>> vqa_agreement("Coca Cola.", ["coca cola"] * 3 + ["coke"] * 7)
    0.9
    """
    if len(answers) < 2:
        raise DataError(f"There are {len(answers)} answers, but agreement with others needs two. VQA sets have ten.")
    given = [normal_vqa(answer) for answer in answers]
    said = normal_vqa(predicted)
    matches = given.count(said)
    return sum(min((matches - (one == said)) / 3, 1.0) for one in given) / len(given)


def normal_vqa(text: str) -> str:
    """Return a VQA answer as the official evaluation compares it.

    Lower case; numbers to ten as digits; no articles; punctuation gone, or a space where it joined words; apostrophes
    of contractions put back.

    Examples
    --------
    >>> normal_vqa("The two dont-walk signs.")
    "2 don't walk signs"
    """
    text = text.replace("\n", " ").replace("\t", " ").strip().lower()
    loose = {mark for mark in _PUNCTUATION if f" {mark}" in text or f"{mark} " in text}
    within_number = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if mark in loose or within_number else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_NUMBER_WORDS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGIT_WORDS)}
# The apostrophe that people leave out: "dont", "couldve", "theyre".
_VERBS = "are ca could did do does had has have is might must should was were wo would ai"
_STEMS = {
    "ve": "could i might must should they we who would you",
    "re": "they there what who you",
    "ll": "it they what who you",
    "d": "how it there they who you",
    "s": "he how let she somebody someone that there what when where who",
    "m": "i",
}
_CONTRACTIONS = {f"{verb}nt": f"{verb}n't" for verb in _VERBS.split(" ")} | {
    f"{stem}{end}": f"{stem}'{end}" for end, stems in _STEMS.items() for stem in stems.split(" ")
}
