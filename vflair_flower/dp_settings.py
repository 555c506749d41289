"""Settings of DP-SGD: what all parties of a job must agree on to train with differential privacy.

s noise multiplier of the whole model's step, s_D and s_B those of the data party's and of the model party's segment.
Invariant: 1/s^2 = 1/s_D^2 + 1/s_B^2 where both segments are trained, so the two noisy parts together are one Gaussian
mechanism of noise multiplier s, whoever sees both.
"""

import math

from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import one_of, settings


@settings
class DpSettings:
    """Train every segment by DP-SGD (Abadi et al., arXiv 1607.00133); a row is the unit that is protected.

    Rows are drawn by Poisson sampling at the rate ``batch_size / rows``, in place of the job's order of batches, so
    that steps have more or fewer rows than `batch_size`, or none.  Each party clips each row's gradient of its own
    segment and adds noise to the sum; the parties tell each other no norms.

    Parameters
    ----------
    epsilon : float
        What each data party's rows may cost over the whole job; the noise follows from it and from the party's number
        of rows.  0: `noise_multiplier` is given instead.
    noise_multiplier : float
        The noise of the whole model's step, in units of what one row can change.  0: `epsilon` is given instead.
    delta : float
        Must be below one in a party's number of rows, or it would allow to publish a row.
    max_grad_norm : float
        Each row's gradient of a data party's segment is scaled down to this norm.
    body_max_grad_norm : float
        The same for the model party's segment; 0: as `max_grad_norm`.
    body_share : float
        How much of ``1 / s^2`` the model party's segment takes: at 0.5 both get the square root of 2 times `s`.
    accountant : str
        ``"prv"`` (Gopi et al., arXiv 2106.02848), or ``"rdp"``, whose epsilon is higher.  GDP is not offered: it is
        lower than the truth for few steps.
    """

    epsilon: float = 0.0
    noise_multiplier: float = 0.0
    delta: float = 1e-5
    max_grad_norm: float = 1.0
    body_max_grad_norm: float = 0.0
    body_share: float = 0.5
    accountant: str = "prv"

    def __post_init__(self) -> None:
        one_of("the accountant", self.accountant, ("prv", "rdp"))
        for name in ("epsilon", "noise_multiplier", "body_max_grad_norm"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; choose 0 (not set) or more.")
        if bool(self.epsilon) is bool(self.noise_multiplier):
            raise ConfigurationError(
                f"epsilon is {self.epsilon} and noise_multiplier {self.noise_multiplier}; one follows from the other. "
                "Set exactly one of them."
            )
        if not 0.0 < self.delta < 1.0:
            raise ConfigurationError(f"delta is {self.delta}; choose 0 < delta < 1 / (rows of the smallest party).")
        if not 0.0 < self.max_grad_norm < math.inf:
            raise ConfigurationError(
                f"max_grad_norm is {self.max_grad_norm}; without a bound no noise hides a row. Choose more than 0."
            )
        if not 0.0 < self.body_share < 1.0:
            raise ConfigurationError(
                f"body_share is {self.body_share}; a segment without a share would need endless noise. Choose "
                "0 < body_share < 1, or scope 'local' to leave the model party's segment as it is."
            )

    @property
    def body_clip(self) -> float:
        """The bound of a row's gradient of the model party's segment."""
        return self.body_max_grad_norm or self.max_grad_norm

    def split(self, noise_multiplier: float, *, body_trained: bool, bodies: int = 1) -> tuple[float, float]:
        """Return the noise multipliers of the data party's and of the model party's segment.

        Parameters
        ----------
        noise_multiplier : float
            Of both together.
        body_trained : bool
            Whether the model party's segment is trained; if not, its noise is 0.
        bodies : int
            How many parties hold a part of it, each with noise of its own; the second number is that of each.
        """
        if not body_trained:
            return noise_multiplier, 0.0
        own, body = 1.0 - self.body_share, self.body_share / bodies
        return noise_multiplier / math.sqrt(own), noise_multiplier / math.sqrt(body)


def joint_multiplier(*multipliers: float) -> float:
    """Return the noise multiplier of several Gaussian mechanisms on the same rows, seen together.

    Examples
    --------
    >>> round(joint_multiplier(2.0**0.5, 2.0**0.5), 6)
    1.0
    """
    return 1.0 / math.sqrt(sum(1.0 / (one * one) for one in multipliers))
