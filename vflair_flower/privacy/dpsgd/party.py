"""A data party's side of DP-SGD: draws rows, clips, accounts, adds noise; refuses every step that skips one of them.

    private.begin(encoded, ...)            # the noise, and the oracle
    for step in steps:
        rows = private.indices(step)       # Poisson: any number, also none
        private.backward(losses_B)         # clipped per row; the parameters' own gradients stay empty
        optimizer.step()                   # attached to the session: accounts, adds noise, steps at both parties

B rows of a forward pass, L rows of a step that are expected, N of the party, s noise multiplier.
Invariant: parameters change only by steps that were drawn, accounted and noised, or `covers` raises.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vflair_flower.dp_settings import DpSettings
from vflair_flower.errors import ConfigurationError, DataError, SessionError
from vflair_flower.privacy.defence import Needs, Place
from vflair_flower.privacy.dpsgd.accounting import Accountant, noise_for
from vflair_flower.privacy.dpsgd.noise import clipped_sum, noised
from vflair_flower.privacy.dpsgd.oracle import check_rows
from vflair_flower.privacy.dpsgd.rows import RowSampler
from vflair_flower.privacy.secret import Noise, Secret
from vflair_flower.privacy.shield import Shield
from vflair_flower.tasks import Encoded

COVER = "dp-sgd"
"""How a policy names trained parameters that only private steps have changed."""
MOVED_AFTER = 3
"""Steps after which every trained parameter must have moved."""


class PrivateTraining:
    """DP-SGD in one training session of a data party.

    Parameters
    ----------
    model : torch.nn.Module
        The party's model with holes.
    settings : DpSettings
        The job's.
    accountant : Accountant
        The party's, with what earlier sessions spent.
    secret : Secret
        The party's own: who knows the noise can take it away, and who knows who was drawn needs less.
    occasion : str
        Names the session; noise and draws are new in every one, also where a round is repeated.
    body_trained : bool
        Whether the model party's segment is trained as well, or hosts' experts are.
    repeatable : bool
        Whether others can compute the secret.
    bodies : int
        How many parties hold what is trained elsewhere: hosts of experts, or one model party.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: DpSettings,
        *,
        accountant: Accountant,
        secret: Secret,
        occasion: str,
        body_trained: bool,
        repeatable: bool = False,
        bodies: int = 1,
    ) -> None:
        self.settings = settings
        self.accountant = accountant
        self.multiplier = 0.0
        """s, of both segments together; 0 before `begin`."""
        self.sample_rate = 0.0
        self.expected_rows = 0
        self.worst_difference = math.nan
        """Between rows' gradients and the oracle's, as a part of the largest gradient."""
        self._model = model
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._body_trained = body_trained
        self._repeatable = repeatable
        self._bodies = bodies
        self._noise = Noise(secret, COVER, "noise", occasion)
        self._draws = Noise(secret, COVER, "rows", occasion).on(torch.device("cpu"))
        self._num_rows = 0
        self._sums: dict[str, Tensor] = {}
        self._drawn: int | None = None
        self._seen = 0
        self._released = False
        self._steps = 0
        self._moved = False
        if not self._parameters:
            raise ConfigurationError("this party trains nothing, so DP-SGD has nothing to protect. Leave it out.")
        self._sampler = RowSampler(model)
        self._start: dict[str, Tensor] = {}
        self._versions: list[int] = []
        model.register_forward_pre_hook(self._expect, with_kwargs=True)

    def begin(
        self,
        encoded: Sequence[Encoded],
        *,
        batch_size: int,
        total_steps: int,
        loss_of: Callable[[Sequence[Encoded]], Tensor],
    ) -> None:
        """Work out the noise, and hold some rows' gradients against the oracle.

        Parameters
        ----------
        encoded : sequence of Encoded
            All of the party's training rows.
        batch_size : int
            L.
        total_steps : int
            Of the whole job.
        loss_of : callable
            Returns some rows' losses, [B], without calling anybody.

        Raises
        ------
        ConfigurationError
            The settings do not fit the rows, or the model cannot be trained privately.
        """
        count = len(encoded)
        twice = len(encoded) - len({row.row_id for row in encoded})
        if twice:
            raise DataError(
                f"{twice} of {count} training rows share their id with another, as windows of one long text do: "
                "DP-SGD would protect each of them as if it were a row of its own. Raise max_tokens so that every row "
                "fits into one window, or give every row its own id."
            )
        if self.settings.delta * count >= 1.0:
            raise ConfigurationError(
                f"delta is {self.settings.delta} and this party has {count} rows: one row may be published outright "
                f"with such a delta. Choose one below {1.0 / count:.1e}."
            )
        if batch_size > count:
            raise ConfigurationError(
                f"batch_size is {batch_size} and this party has {count} rows; no row can be drawn more often than "
                "always. Choose smaller batches."
            )
        self._num_rows, self.expected_rows = count, batch_size
        self.sample_rate = batch_size / count
        self.multiplier = noise_for(self.settings, sample_rate=self.sample_rate, steps=total_steps)
        tried = (list(encoded) * 2)[: max(2, min(3, count))]
        self.worst_difference = check_rows(
            self._sampler,
            self._model,
            lambda part: loss_of(tried[part]).sum(),
            len(tried),
            segment="the data party's segment",
        )
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._versions = self._current_versions()

    def indices(self, step: int) -> list[int]:
        """Draw the rows of a step: each with the same chance, whatever the others; opens the step."""
        if not self.multiplier:
            raise SessionError("rows were drawn before begin(), so there is no noise yet. Call it first.")
        if self._drawn is not None:
            raise SessionError(
                f"rows were drawn for step {step}, and those drawn before were never stepped with: drawing until one "
                "likes the rows is not Poisson sampling. Take a step after each draw."
            )
        chance_N = torch.rand(self._num_rows, generator=self._draws, dtype=torch.float64)
        drawn = torch.nonzero(chance_N < self.sample_rate).flatten().tolist()
        self._drawn, self._seen, self._sums = len(drawn), 0, {}
        return [int(row) for row in drawn]

    def expect_drawn(self, rows: int) -> None:
        """Open a step of so many rows that were drawn elsewhere, as a measurement does that needs the same rows twice.

        Nothing leaves a session afterwards that did so: the account speaks of Poisson sampling.
        """
        self._drawn, self._seen, self._sums, self._repeatable = rows, 0, {}, True

    def backward(self, losses_B: Tensor) -> None:
        """Differentiate rows' losses, and add the rows' clipped gradients to the step's sum.

        Parameters
        ----------
        losses_B : Tensor
            One loss per row; a batch may come in portions.

        Raises
        ------
        SessionError
            No rows were drawn, or a parameter's gradient has no rows.
        """
        if self._drawn is None:
            raise SessionError("a batch was differentiated that nobody drew. Draw each step's rows (indices) first.")
        if losses_B.dim() != 1:
            raise SessionError(
                f"losses of shape {tuple(losses_B.shape)} were to be differentiated; a loss over several rows couples "
                "them, and clipping would bound nothing. Give one loss per row, [B]."
            )
        taken = self._sampler.taken
        if taken is None or taken.rows != len(losses_B):
            raise SessionError(
                f"{len(losses_B)} losses were to be differentiated, and the model's last forward pass was over "
                f"{'no' if taken is None else taken.rows} rows. Differentiate each pass before the next one."
            )
        losses_B.sum().backward()
        reached = {name: p.grad for name, p in self._parameters.items()}
        rows = self._sampler.take(taken, reached)
        for parameter in self._parameters.values():
            parameter.grad = None
        with torch.no_grad():
            for name, own in clipped_sum(rows, self.settings.max_grad_norm).items():
                self._sums[name] = self._sums[name] + own if name in self._sums else own
        self._seen += len(losses_B)

    def release(self) -> None:
        """Put the step on the account, and give every parameter its noised gradient; the session calls it.

        Raises
        ------
        SessionError
            The rows were not drawn or not all gone through, or somebody changed the parameters on the side.
        """
        if self._drawn is None:
            raise SessionError(
                "an optimiser step is due for rows that nobody drew, so it cannot be put on the account. Nothing was "
                "stepped. Draw each step's rows with session.privacy.indices(step)."
            )
        if self._seen != self._drawn:
            raise SessionError(
                f"{self._drawn} rows were drawn for this step, and {self._seen} went through backward(): what was "
                "stepped with would not be what is on the account. Nothing was stepped."
            )
        self._check_versions()
        own, _ = self._multipliers()
        self.accountant.add(noise_multiplier=self.multiplier, sample_rate=self.sample_rate)
        bound = self.settings.max_grad_norm
        with torch.no_grad():
            gradients = noised(self._sums, self._parameters.items(), deviation=own * bound, noise=self._noise)
            for name, parameter in self._parameters.items():
                parameter.grad = gradients[name].div_(self.expected_rows)
        self._sums, self._released = {}, True

    def request(self) -> dict[str, Any]:
        """Return what the model party must know of the coming step.

        Raises
        ------
        SessionError
            The step was not put on the account.
        """
        if not self._released:
            raise SessionError(
                "the model party is to step, and this party's step is not on the account. Attach the optimiser to the "
                "session (session.attach), or call before_step() before each step."
            )
        _, body = self._multipliers()
        return {"noise": body, "sample_rate": self.sample_rate, "empty": self._drawn == 0}

    def confirm(self, told: Mapping[str, Any]) -> None:
        """Raise SessionError unless the model party added the noise that it was asked for; closes the step."""
        _, wanted = self._multipliers()
        found = told.get("noise", 0.0 if wanted else None)
        if wanted and not float(found or 0.0) >= wanted:
            raise SessionError(
                f"the model party stepped with noise of the multiplier {found}, and {wanted:.4g} was asked for: its "
                "segment tells more of this party's rows than is on the account. Training stops. Use a model party of "
                "the same version."
            )
        self._drawn, self._released = None, False
        self._steps += 1
        self._versions = self._current_versions()
        if self._steps == MOVED_AFTER:
            self._check_moved()

    @property
    def pass_rows(self) -> int:
        """How many rows the newest forward pass has, B."""
        if self._sampler.taken is None:
            raise SessionError("rows were asked for before any forward pass of training. Run one first.")
        return self._sampler.taken.rows

    @property
    def marks(self) -> tuple[str, ...]:
        """How what holds this party's noise is marked: not at all where others can compute the noise."""
        return () if self._repeatable else (COVER,)

    def covers(self) -> tuple[str, ...]:
        """Return how trained parameters that leave are marked: none where others can compute the noise.

        Raises
        ------
        SessionError
            Parameters were changed by anything but private steps, or have not moved.
        """
        self._check_versions()
        if self._released or self._drawn is not None:
            raise SessionError("a step was drawn and never finished; nothing leaves. Step, or leave the session.")
        if self._steps and not self._moved:
            self._check_moved()
        return self.marks

    @property
    def public_examples(self) -> int:
        """How many rows a reply says were trained on: what was expected, since the true number is the rows' secret."""
        return self._steps * self.expected_rows

    def summary(self) -> dict[str, float]:
        """Return what a report says: epsilon of all steps so far and what it follows from."""
        if not self.multiplier:
            return {}
        own, body = self._multipliers()
        return {
            "epsilon": self.accountant.epsilon(),
            "epsilon_rdp": self.accountant.epsilon("rdp"),
            "delta": self.settings.delta,
            "steps": float(self.accountant.steps),
            "sample_rate": self.sample_rate,
            "noise_multiplier": self.multiplier,
            "own_noise_multiplier": own,
            "body_noise_multiplier": body,
            "max_grad_norm": self.settings.max_grad_norm,
            "oracle_difference": self.worst_difference,
        }

    def _multipliers(self) -> tuple[float, float]:
        """Return the noise multipliers here, and at each other party that trains a part."""
        return self.settings.split(self.multiplier, body_trained=self._body_trained, bodies=self._bodies)

    def _expect(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and self._model.training:
            given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.dim()]
            self._sampler.begin(len(given[0]) if given else 0)

    def _current_versions(self) -> list[int]:
        return [p._version for p in self._parameters.values()]

    def _check_versions(self) -> None:
        changed = [
            name
            for (name, p), before in zip(self._parameters.items(), self._versions, strict=False)
            if p._version != before
        ]
        if changed:
            raise SessionError(
                f"the parameter {changed[0]!r} was changed since the last private step, by something that is not on "
                "the account: perhaps an optimiser that is not attached to the session. Nothing leaves. Let attached "
                "optimisers alone change parameters."
            )

    def _check_moved(self) -> None:
        still = [name for name, p in self._parameters.items() if torch.equal(p.detach(), self._start[name])]
        if still:
            raise SessionError(
                f"after {self._steps} private steps {len(still)} of {len(self._parameters)} trained parameters have "
                f"not moved, {still[0]!r} among them, though each got noise: the optimiser does not hold them, or the "
                "learning rate is too small for their precision. Training stops."
            )
        self._moved, self._start = True, {}


def refuse_shield(shield: Shield) -> None:
    """Raise ConfigurationError for defences whose own learning would tell of rows without noise."""
    for one in shield:
        learns = any(p.requires_grad for p in one.parameters())
        reads = one.about.needs in (Needs.OWN_TEXTS, Needs.TRAINING)
        if one.mixes_rows:
            raise ConfigurationError(
                f"the job trains by DP-SGD, and the defence {one.text!r} lets one row change what is sent of others, "
                "so clipping a row's gradient bounds nothing. Leave one of the two out, or switch that part of it off "
                "(sparsify: feedback=false)."
            )
        if learns or reads or one.places & {Place.LABELS, Place.LOSS}:
            what = "is trained with the model" if learns else "learns from the party's rows" if reads else "changes it"
            raise ConfigurationError(
                f"the job trains by DP-SGD, and the defence {one.text!r} {what}, without noise; what it has learnt "
                "shapes every later gradient, and one row would show there. Leave one of the two out."
            )


__all__ = ["COVER", "PrivateTraining", "refuse_shield"]
