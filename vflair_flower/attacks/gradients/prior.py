"""How likely a text is, for choosing between orders of the same words: an n-gram model of the adversary's own texts.

LAMP asks a GPT-2 with BERT's vocabulary; a small model of counts needs no download and no GPU, and is weaker.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

_KEPT = (0.1, 0.3, 0.6)
"""How much unigrams, bigrams and trigrams weigh; what a history has never seen goes to the shorter ones."""


class NgramPrior:
    """An interpolated trigram model over tokens.

    Parameters
    ----------
    texts : iterable of sequences of int
        Tokens of the adversary's texts.
    vocabulary : int
        How many tokens there are; an unseen one gets an equal share of one count.
    """

    def __init__(self, texts: Iterable[Sequence[int]], vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(3)]
        self._histories: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(3)]
        for text in texts:
            for place in range(len(text)):
                for order in range(min(place, 2) + 1):
                    self._counts[order][tuple(text[place - order : place + 1])] += 1
                    self._histories[order][tuple(text[place - order : place])] += 1

    def surprise(self, text: Sequence[int]) -> float:
        """Return the mean of minus the log of each token's probability after the two before it, in nats."""
        total = 0.0
        for place in range(len(text)):
            chance = (self._counts[0][text[place],] + 1 / self._vocabulary) / (self._histories[0][()] + 1)
            likely, weight = _KEPT[0] * chance, _KEPT[0]
            for order in (1, 2):
                history = tuple(text[max(0, place - order) : place])
                seen = self._histories[order][history] if len(history) == order else 0
                if seen:
                    likely += _KEPT[order] * self._counts[order][(*history, text[place])] / seen
                    weight += _KEPT[order]
            total -= math.log(likely / weight)
        return total / max(1, len(text))
