"""Links slower than those of one machine, emulated: for measurements of what a deployment between companies would be.

What it is: a time before which a chunk may not leave the hub.  What it is not: a network; nothing is lost or reordered,
and what goes up to the hub is not delayed.  Invariant: a chunk leaves no earlier than the link would have delivered it.
"""

import math
import time
from dataclasses import dataclass

from vflair_flower.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class LinkEmulation:
    """One link from the hub to each party.

    Parameters
    ----------
    delay_s : float
        Seconds that every chunk takes from the hub to a party; a call and its reply between parties take two of them.
    bytes_per_s : float
        What the link carries; infinite by default.

    Raises
    ------
    ConfigurationError
        If a value is out of range.
    """

    delay_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 <= self.delay_s < math.inf or not self.bytes_per_s > 0.0:
            raise ConfigurationError(
                f"delay_s is {self.delay_s} and bytes_per_s {self.bytes_per_s}; choose a delay of 0 or more, and a "
                "rate above 0."
            )


class DueTimes:
    """When chunks of one link may leave."""

    def __init__(self, link: LinkEmulation | None) -> None:
        self._link = link
        self._free_at = 0.0

    def next(self, size: int) -> float:
        """Return when a chunk of so many bytes that is queued now may leave, on the clock of `time.monotonic`."""
        if self._link is None:
            return 0.0
        self._free_at = max(self._free_at, time.monotonic()) + size / self._link.bytes_per_s
        return self._free_at + self._link.delay_s
