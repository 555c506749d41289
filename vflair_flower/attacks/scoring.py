"""How good a guess is: the only place that knows the truth.

Positions that are special tokens or padding count nowhere.  Every figure has its chance level, how many rows it is
from, and a 95 % interval: a percentile bootstrap over rows.  Texts: ROUGE by rouge-score, BLEU by sacrebleu, areas by
scikit-learn.

Chance for texts is not zero: it is what auxiliary texts, put in the place of the guess, get by the same metrics.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerBase

from vflair_flower.attacks.guesses import Guess, LabelGuess, MemberGuess, TextGuess
from vflair_flower.errors import DataError
from vflair_flower.tasks import IGNORED, Encoded, EncodedText, Secret, mean_interval, rouge
from vflair_flower.tasks.overlap import corpus_bleu
from vflair_flower.tasks.scores import Places, corpus_score

_FALSE_POSITIVE_RATES = {"tpr_at_1_percent_fpr": 0.01, "tpr_at_0.1_percent_fpr": 0.001}
_CHANCE_DRAWS = 20


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One metric of a guess.

    Parameters
    ----------
    value : float
        In 0..1, all metrics.
    low, high : float
        Its 95 % interval.
    chance : float
        What a guess without looking gets.
    n : int
        Rows it is from.
    """

    value: float
    low: float
    high: float
    chance: float
    n: int

    def to_json(self) -> dict[str, float]:
        """Return the figure by field."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """What the victim has; for the scorer alone.

    Parameters
    ----------
    ids : tuple of Tensor
        Tokens of each row, int64, in the order of the view.
    counted : tuple of Tensor
        Bool, for each of them, whether it is text: no begin, end or padding.
    tokenizer : PreTrainedTokenizerBase
        Makes texts of tokens.
    labels : Tensor or None
        Int64 [N], the rows' classes.
    row_ids : tuple of str
        The rows.
    members : Tensor or None
        Bool [N], of candidates, whether they were trained on.
    secrets : tuple of Secret
        Planted in these rows.
    asked : tuple of Tensor
        Bool, for each token of a language model's rows, whether the loss asks for it; else empty.
    """

    ids: tuple[Tensor, ...]
    counted: tuple[Tensor, ...]
    tokenizer: PreTrainedTokenizerBase
    labels: Tensor | None = None
    row_ids: tuple[str, ...] = ()
    members: Tensor | None = None
    secrets: tuple[Secret, ...] = ()
    asked: tuple[Tensor, ...] = ()

    @classmethod
    def of(
        cls,
        encoded: Sequence[Encoded],
        tokenizer: PreTrainedTokenizerBase,
        *,
        texts: Sequence[Tensor] | None = None,
        secrets: Sequence[Secret] = (),
    ) -> "Truth":
        """Return the truth of rows; `texts` replaces their tokens, for instance by what was written."""
        ids = [torch.tensor(row.input_ids) for row in encoded] if texts is None else list(texts)
        special = torch.tensor(sorted(tokenizer.all_special_ids))
        labels = [getattr(row, "label", None) for row in encoded]
        whole = all(isinstance(label, int) for label in labels)
        row_ids = tuple(row.row_id for row in encoded)
        return cls(
            ids=tuple(ids),
            counted=tuple(~torch.isin(one, special) for one in ids),
            tokenizer=tokenizer,
            labels=torch.tensor(labels) if whole else None,
            row_ids=row_ids,
            secrets=tuple(secret for secret in secrets if secret.row_id in row_ids),
            asked=_asked(encoded) if texts is None else (),
        )

    def as_labels(self) -> "Truth":
        """Return the truth of labels that are text: only tokens that the loss asks for count."""
        if not self.asked:
            return self
        return replace(self, counted=tuple(c & a for c, a in zip(self.counted, self.asked, strict=True)))

    def text(self, ids: Tensor) -> str:
        """Return tokens as text, without special ones."""
        wanted = [int(token) for token in ids if token >= 0]
        return str(self.tokenizer.decode(wanted, skip_special_tokens=True)).strip()


def _asked(encoded: Sequence[Encoded]) -> tuple[Tensor, ...]:
    texts = [row for row in encoded if isinstance(row, EncodedText)]
    return tuple(torch.tensor(row.labels) != IGNORED for row in texts) if len(texts) == len(encoded) else ()


def score(
    guess: Guess,
    truth: Truth,
    *,
    auxiliary: Sequence[Encoded] = (),
    embed: Callable[[Sequence[str]], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Figure]:
    """Return a guess's figures by metric.

    Parameters
    ----------
    guess : Guess
        What an attack came to.
    truth : Truth
        Of the same rows.
    auxiliary : sequence of Encoded
        Texts that are not the victim's; chance is drawn from them.
    embed : callable, optional
        Returns an embedding [N, D] for texts; without one there is no ``embedding_cosine``.
    seed : int
        Of chance and bootstrap.

    Raises
    ------
    DataError
        The guess is for other rows than the truth, or the truth lacks what is asked.
    """
    if isinstance(guess, TextGuess):
        return _score_texts(guess, truth, auxiliary, embed, seed)
    if isinstance(guess, LabelGuess):
        return _score_labels(guess, truth, seed)
    return _score_members(guess, truth, seed)


def guessed_texts(guess: TextGuess, truth: Truth) -> list[tuple[str, str]]:
    """Return pairs of the true text of each row and what the guess makes of it, for people to read."""
    guess = _matched(guess, truth)
    pairs = []
    for ids, true, counted in zip(guess.ids, truth.ids, truth.counted, strict=True):
        pairs.append((truth.text(true), truth.text(ids[counted] if guess.aligned else ids)))
    return pairs


# ---- texts ----


@dataclass(kw_only=True)
class _Rows:
    """One value per row and metric, and the texts for metrics of a corpus."""

    shares: dict[str, list[float]] = field(default_factory=dict)
    guessed: list[str] = field(default_factory=list)
    true: list[str] = field(default_factory=list)


def _score_texts(
    guess: TextGuess,
    truth: Truth,
    auxiliary: Sequence[Encoded],
    embed: Callable[[Sequence[str]], Tensor] | None,
    seed: int,
) -> dict[str, Figure]:
    if len(guess.ids) != len(truth.ids):
        raise DataError(
            f"the guess has {len(guess.ids)} rows and the truth {len(truth.ids)}; score the guess at the same view."
        )
    matched = guess.matched
    guess = _matched(guess, truth)
    found = _text_rows(guess.ids, truth, aligned=guess.aligned, embed=embed)
    by_chance = _chance(truth, auxiliary, aligned=guess.aligned, matched=matched, embed=embed, seed=seed)
    figures = {}
    for name, values in found.shares.items():
        kept = [value for value in values if not math.isnan(value)]
        if not kept:
            continue
        interval = mean_interval(kept, seed=seed)
        chance = by_chance.get(name, 0.0)
        figures[name] = Figure(
            value=interval.estimate, low=interval.low, high=interval.high, chance=chance, n=len(kept)
        )
    if any(found.true):
        bleu = corpus_bleu(found.guessed, [[text] for text in found.true])
        whole = corpus_score("bleu", bleu, count=len(found.true), seed=seed, resamples=200)
        figures["bleu"] = Figure(
            value=whole.value / 100,
            low=whole.interval.low / 100,
            high=whole.interval.high / 100,
            chance=by_chance.get("bleu", 0.0),
            n=whole.count,
        )
    return figures


def _text_rows(
    guesses: Sequence[Tensor],
    truth: Truth,
    *,
    aligned: bool,
    embed: Callable[[Sequence[str]], Tensor] | None,
) -> _Rows:
    rows = _Rows()
    special = set(truth.tokenizer.all_special_ids)
    for index, (ids, true_ids, counted) in enumerate(zip(guesses, truth.ids, truth.counted, strict=True)):
        wanted = true_ids[counted].tolist()
        if not wanted:
            continue
        if aligned:
            if len(ids) != len(true_ids):
                raise DataError(f"row {index} has {len(true_ids)} tokens and its aligned guess {len(ids)}.")
            chosen = ids[counted].tolist()
            right = [one == other for one, other in zip(chosen, wanted, strict=True)]
            _add(rows, "position_accuracy", sum(right) / len(right))
            _add(rows, "exact_match", float(all(right)))
        else:
            chosen = [int(token) for token in ids if int(token) not in special]
            _add(rows, "exact_match", float(chosen == wanted))
        words = [token for token in chosen if token >= 0]
        shared = (Counter(words) & Counter(wanted)).total()
        precision, recall = shared / max(1, len(words)), shared / len(wanted)
        _add(rows, "token_precision", precision)
        _add(rows, "token_recall", recall)
        _add(rows, "token_f1", 2 * precision * recall / max(precision + recall, 1e-12))
        # As VFLAIR-LLM counts: any true position whose token occurs anywhere in the guess, special ones included.
        everything = set(ids.tolist())
        _add(rows, "vflair_recall", sum(token in everything for token in true_ids.tolist()) / len(true_ids))
        guessed, true = truth.text(torch.tensor(words, dtype=torch.int64)), truth.text(true_ids)
        rows.guessed.append(guessed)
        rows.true.append(true)
        pairs = len(true.split()) > 1  # a single word has none
        for kind in ("rouge1", *(("rouge2",) if pairs else ()), "rougeL"):
            _add(rows, kind, rouge(kind, guessed, [true]) if true else 0.0)
        hits = [shows(guessed, secret.value) for secret in truth.secrets if secret.row_id == _row_id(truth, index)]
        if hits:
            _add(rows, "secret_hit_rate", sum(hits) / len(hits))
    if embed is not None and rows.true:
        near = cosine_similarity(embed(rows.guessed), embed(rows.true), dim=-1).clamp(0, 1)
        rows.shares["embedding_cosine"] = near.tolist()
    return rows


def _chance(
    truth: Truth,
    auxiliary: Sequence[Encoded],
    *,
    aligned: bool,
    matched: bool,
    embed: Callable[[Sequence[str]], Tensor] | None,
    seed: int,
) -> dict[str, float]:
    """Return what auxiliary texts get in the guess's place, on the mean of some draws."""
    if not auxiliary:
        return {}
    generator = np.random.default_rng(seed)
    special = torch.tensor(sorted(truth.tokenizer.all_special_ids))
    streams = [torch.tensor(row.input_ids) for row in auxiliary]
    sums: dict[str, list[float]] = {}
    for draw in range(max(1, min(_CHANCE_DRAWS, 400 // max(1, len(truth.ids))))):
        drawn = []
        for ids in truth.ids:
            stream = torch.cat([streams[int(i)] for i in generator.integers(len(streams), size=4)])
            if aligned:  # its special tokens stand where a text's do
                own = streams[int(generator.integers(len(streams)))]
                stream = torch.cat([own, stream[~torch.isin(stream, special)]])
            while len(stream) < len(ids):
                stream = torch.cat([stream, stream])
            drawn.append(stream[: len(ids)])
        if not aligned:  # where rows of a guess are matched, those of chance are as well: it raises both
            drawn = list(_matched(TextGuess(ids=tuple(drawn), aligned=False, matched=matched), truth).ids)
        # Embedding costs far more than all else, and its mean varies little: once.
        rows = _text_rows(drawn, truth, aligned=aligned, embed=None if draw else embed)
        for name, values in rows.shares.items():
            kept = [value for value in values if not math.isnan(value)]
            if kept:
                sums.setdefault(name, []).append(sum(kept) / len(kept))
        if rows.true:
            bleu = corpus_bleu(rows.guessed, [[text] for text in rows.true])
            sums.setdefault("bleu", []).append(bleu(np.arange(len(rows.true))) / 100)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def _matched(guess: TextGuess, truth: Truth) -> TextGuess:
    """Return a guess whose rows stand at those of the truth that they are most like (Hungarian, by shared tokens)."""
    if guess.matched or len(guess.ids) != len(truth.ids):
        return guess
    from scipy.optimize import linear_sum_assignment

    gains = np.zeros((len(guess.ids), len(truth.ids)))
    for row, ids in enumerate(guess.ids):
        for column, (true, counted) in enumerate(zip(truth.ids, truth.counted, strict=True)):
            wanted = Counter(true[counted].tolist())
            shared = (Counter(ids.tolist()) & wanted).total()
            gains[row, column] = 2 * shared / max(1, len(ids) + wanted.total())
    rows, columns = linear_sum_assignment(gains, maximize=True)
    ordered = [guess.ids[int(row)] for _, row in sorted(zip(columns, rows, strict=True))]
    return TextGuess(ids=tuple(ordered), aligned=guess.aligned)


def shows(guessed: str, secret: str) -> bool:
    """Whether a text shows a secret, whatever its case and spaces."""
    return "".join(secret.lower().split()) in "".join(guessed.lower().split())


def _row_id(truth: Truth, index: int) -> str:
    return truth.row_ids[index] if truth.row_ids else ""


def _add(rows: _Rows, name: str, value: float) -> None:
    rows.shares.setdefault(name, []).append(value)


# ---- labels and members ----


def _score_labels(guess: LabelGuess, truth: Truth, seed: int) -> dict[str, Figure]:
    if truth.labels is None:
        raise DataError("the rows have no classes, so a guess at labels cannot be scored. Attack a classification.")
    labels = truth.labels
    count = len(labels)
    figures: dict[str, Figure] = {}
    if guess.labels is not None:
        _same_length(len(guess.labels), count)
        right = (guess.labels == labels).double().tolist()
        commonest = int(torch.bincount(labels).max()) / count
        interval = mean_interval(right, seed=seed)
        figures["label_accuracy"] = Figure(
            value=interval.estimate, low=interval.low, high=interval.high, chance=commonest, n=count
        )
    if guess.scores is not None:
        _same_length(len(guess.scores), count)
        if set(labels.tolist()) == {0, 1}:
            figures |= _areas(guess.scores, labels.bool(), seed)
    return figures


def _score_members(guess: MemberGuess, truth: Truth, seed: int) -> dict[str, Figure]:
    if truth.members is None:
        raise DataError("nobody said which candidates were trained on, so a guess at members cannot be scored.")
    _same_length(len(guess.scores), len(truth.members))
    return _areas(guess.scores, truth.members, seed)


def _areas(scores: Tensor, positive: Tensor, seed: int) -> dict[str, Figure]:
    """Return the area under the curve, and true positive rates at small false positive rates."""
    from sklearn.metrics import roc_auc_score, roc_curve

    values, truth = scores.double().numpy(), positive.numpy()
    if not np.isfinite(values).all():
        raise DataError("a score is not a finite number. Give one number per row, larger for likelier rows.")

    def auc(places: Places) -> float:
        chosen = truth[places]
        return float(roc_auc_score(chosen, values[places])) if 0 < chosen.sum() < len(chosen) else math.nan

    def rate(at: float) -> Callable[[Places], float]:
        def share(places: Places) -> float:
            chosen = truth[places]
            if not 0 < chosen.sum() < len(chosen):
                return math.nan
            false, true, _ = roc_curve(chosen, values[places])
            return float(true[false <= at].max())

        return share

    statistics: dict[str, tuple[Callable[[Places], float], float]] = {"auc": (auc, 0.5)}
    statistics |= {name: (rate(at), at) for name, at in _FALSE_POSITIVE_RATES.items()}
    figures = {}
    for name, (statistic, chance) in statistics.items():
        whole: Any = corpus_score(name, statistic, count=len(truth), seed=seed, resamples=300)
        figures[name] = Figure(
            value=whole.value, low=whole.interval.low, high=whole.interval.high, chance=chance, n=len(truth)
        )
    return figures


def _same_length(guessed: int, true: int) -> None:
    if guessed != true:
        raise DataError(f"the guess has {guessed} rows and the truth {true}; score the guess at the same view.")
