"""Settings of secure aggregation: what all parties of a job must agree on so that only sums of their arrays are seen.

Numbers are fixed point in the ring of 64-bit integers.  Invariant: no sum that the settings allow wraps around, so a
weighted mean is off by at most ``2^-(fraction bits + 1)``, and by its own rounding to the arrays' dtype.
"""

import math

from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import settings

_LEAST_BITS = 16
_MANY_PARTIES = 1000


@settings
class SecAggSettings:
    """Sum what the data parties train under masks (Bonawitz et al., CCS 2017, IACR ePrint 2017/281).

    With `neighbours` set it is the graph of SecAgg+ (Bell et al., CCS 2020, IACR ePrint 2020/704).

    Parameters
    ----------
    threshold : float
        Which part of those that hold a party's secrets in shares is needed to put them together: more than 1/2, at most
        1.  Fewer parties left in a round end the job; fewer parties that work with the strategy learn nothing.
    clip : float
        The largest magnitude of a trained number or a metric; a party with a larger one refuses to send.
    max_weight : int
        The largest `num_examples` of a party in a round.
    neighbours : int
        0: every two parties share a mask.  An even number: each party does with so many others alone, on a ring that
        the strategy shuffles in every round; for many parties.
    """

    threshold: float = 2 / 3
    clip: float = 64.0
    max_weight: int = 2**20
    neighbours: int = 0

    def __post_init__(self) -> None:
        if not 0.5 < self.threshold <= 1.0:
            raise ConfigurationError(
                f"threshold is {self.threshold}; with half of the shares or fewer, one half of the parties could be "
                "told that a party is lost and the other half that it is not, and its arrays would be seen. Choose "
                "more than 0.5, at most 1."
            )
        if not 0.0 < self.clip < math.inf:
            raise ConfigurationError(f"clip is {self.clip}; choose more than 0: the largest magnitude of a number.")
        if self.max_weight < 1:
            raise ConfigurationError(f"max_weight is {self.max_weight}; choose 1 or more: rows of a party in a round.")
        if self.neighbours < 0 or self.neighbours % 2:
            raise ConfigurationError(
                f"neighbours is {self.neighbours}; half of them are on each side of a ring. Choose an even number, or "
                "0 for all parties."
            )
        bits = self.fraction_bits(_MANY_PARTIES)
        if bits < _LEAST_BITS:
            raise ConfigurationError(
                f"clip is {self.clip:g} and max_weight {self.max_weight}, which leave {bits} bits behind the point for "
                f"{_MANY_PARTIES} parties; {_LEAST_BITS} are needed. Lower either."
            )

    def needed(self, holders: int) -> int:
        """Return how many of `holders` shares put a secret together; more than half, at least 2.

        Examples
        --------
        >>> [SecAggSettings().needed(n) for n in (2, 3, 4, 6)]
        [2, 2, 3, 4]
        """
        # 2/3 of 3 may be 2.0000000000000004.
        return max(math.ceil(self.threshold * holders - 1e-9), holders // 2 + 1, 2)

    def fraction_bits(self, parties: int) -> int:
        """Return how many bits stand behind the point when so many parties are summed; the error is half the last."""
        return 62 - (parties * self.max_weight * math.ceil(self.clip)).bit_length()
