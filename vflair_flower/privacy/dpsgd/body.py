"""The model party's side of DP-SGD: clips each row's gradient of its segment, and adds noise to every step.

s_B noise multiplier of the segment.  A party asks for the noise that its account needs; a step that several parties
take together gets the most that any of them asked for, and each row is in one party's sum alone.
Invariant: no step is taken without noise, whichever way parties' gradients are combined.
"""

import threading
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vflair_flower.dp_settings import DpSettings
from vflair_flower.errors import CheckpointError, SessionError
from vflair_flower.privacy.dpsgd.accounting import Accountant
from vflair_flower.privacy.dpsgd.noise import noised
from vflair_flower.privacy.secret import Noise


class Asked(Protocol):
    """A party's word that a step is due (`vflair_flower.remote.updates.StepRequest`)."""

    @property
    def rows(self) -> int:
        """Rows that are expected in its batch."""

    @property
    def noise(self) -> float:
        """The noise multiplier that it asks for."""

    @property
    def sample_rate(self) -> float:
        """Its sampling rate."""


class BodyPrivacy:
    """Noise and account of a model party's segment over a whole job.

    Parameters
    ----------
    settings : DpSettings
        The job's.
    bodies : int
        How many parties hold a part of the segment, of which this is one.
    """

    def __init__(self, settings: DpSettings, *, bodies: int = 1) -> None:
        self.settings = settings
        self._bodies = bodies
        self.accounts: dict[str, Accountant] = {}
        """By data party: what this segment alone tells of its rows."""
        self._noise: Noise | None = None
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()

    def begin(self, noise: Noise) -> None:
        """Start a session, whose noise is new."""
        self._noise = noise
        self._used = {}

    def check(self, party: str, request: Asked) -> None:
        """Raise SessionError for a step that asks for no noise, or for less than the job says."""
        least = 0.0
        if self.settings.noise_multiplier:
            asked = self.settings.split(self.settings.noise_multiplier, body_trained=True, bodies=self._bodies)
            least = asked[1] * (1 - 1e-9)
        if not (request.noise > 0.0 and request.noise >= least and 0.0 < request.sample_rate <= 1.0):
            raise SessionError(
                f"'{party}' asked for a step with noise of the multiplier {request.noise} at the sampling rate "
                f"{request.sample_rate}, and the job trains by DP-SGD with at least {least:.4g}. Nothing was stepped. "
                "Train with the session's privacy (docs/dp-sgd.md), at the same version."
            )

    def noised(
        self, means: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], requests: Mapping[str, Asked]
    ) -> dict[str, Tensor]:
        """Return the gradients of a step: clipped sums over the expected rows of all its parties, with noise.

        Parameters
        ----------
        means : mapping of str to Tensor
            Clipped sums divided by the expected rows.
        parameters : mapping of str to torch.nn.Parameter
            All that is trained.
        requests : mapping of str to Asked
            The parties whose rows are in it.
        """
        assert self._noise is not None
        for party, request in requests.items():
            self.check(party, request)
        used = max(request.noise for request in requests.values())
        rows = sum(request.rows for request in requests.values())
        with self._lock:
            for party, request in requests.items():
                account = self.accounts.setdefault(party, Accountant(self.settings))
                account.add(noise_multiplier=used, sample_rate=request.sample_rate)
                self._used[party] = used
            with torch.no_grad():
                deviation = used * self.settings.body_clip / rows
                return noised(means, parameters.items(), deviation=deviation, noise=self._noise)

    def used(self, party: str) -> float:
        """Return the noise multiplier of a party's last step."""
        with self._lock:
            return self._used.get(party, 0.0)

    def summary(self) -> dict[str, float]:
        """Return what a report says: the most that this segment tells of any data party's rows."""
        spent = [(one.epsilon(), one.epsilon("rdp"), one.steps) for one in self.accounts.values()]
        if not spent:
            return {}
        epsilon, by_rdp, steps = max(spent)
        return {
            "epsilon": epsilon,
            "epsilon_rdp": by_rdp,
            "delta": self.settings.delta,
            "steps": float(steps),
            "max_grad_norm": self.settings.body_clip,
        }

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {party: account.state() for party, account in sorted(self.accounts.items())}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Put back what `state` returned; raise CheckpointError if there is nothing."""
        if state is None:
            raise CheckpointError(
                "the job trains by DP-SGD, and the model party's saved state has no account of what was spent: it is "
                "of a job without DP-SGD. Start a new job."
            )
        for party, saved in state.items():
            self.accounts[party] = Accountant(self.settings)
            self.accounts[party].load_state(saved)
