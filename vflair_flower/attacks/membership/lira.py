"""The likelihood ratio attack: is a row's confidence what models have that saw the row, or what others have?

N candidates, S shadow models.  Shadows come in pairs: one is trained on a random half of the pool, the other on the
other half, so that every candidate is in just as many as it is not in.
Invariant: nothing of the truth is used; the adversary labels its own shadows.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vflair_flower.attacks.guesses import MemberGuess
from vflair_flower.attacks.knowledge import HeadKnowledge, Knowledge
from vflair_flower.attacks.membership.losses import KINDS, log_odds
from vflair_flower.attacks.membership.reference_loss import refuse_exact
from vflair_flower.attacks.membership.shadows import fine_tuned
from vflair_flower.attacks.membership.view import ModelView
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import LoraSettings, one_of
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import Encoded

_LEAST_SPREAD = 1e-4


@attack(
    "lira",
    goal=Goal.MEMBERS,
    sees=ModelView,
    paper="Carlini et al., S&P 2022, arXiv 2112.03570; shadows are fine-tuned from the public checkpoint, few of them, "
    "and one spread is shared by all candidates, taken around each candidate's own mean",
    kinds=KINDS,
    knowledge=(HeadKnowledge.PUBLIC, HeadKnowledge.ARCHITECTURE),
)
def lira(
    view: ModelView,
    knows: Knowledge,
    *,
    seed: int = 0,
    shadows: int = 8,
    variant: str = "online",
    tuning: str = "job",
    passes: float = 0.0,
    learning_rate: float = 0.0,
    most_auxiliary: int = 1000,
    shared_spread: bool = True,
    batch_rows: int = 32,
) -> MemberGuess:
    """Train shadow models and compare each candidate's confidence with theirs.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`.
    shadows : int
        How many models, an even number; the paper takes 256.
    variant : {"online", "offline"}
        Online: shadows are trained on halves of auxiliary texts and candidates, and the score is the log ratio of the
        two likelihoods.  Offline: on halves of the auxiliary texts alone, and the score is how far the confidence lies
        above theirs.
    tuning : {"job", "lora", "all"}
        What shadows train: what the victim's job does, adapters, or all parameters.
    passes, learning_rate : float
        Of the shadows' training; 0 for the job's.
    most_auxiliary : int
        How many auxiliary texts are in the pool at most.
    shared_spread : bool
        Whether all candidates share one standard deviation, which few shadows call for; else each has its own.
    batch_rows : int
        Rows at once, where confidences are read.

    Raises
    ------
    ConfigurationError
        A setting is out of range, the pool is too small, or the adversary's copy is the finished model.
    """
    one_of("variant", variant, ("online", "offline"))
    refuse_exact(knows, "lira")
    if shadows < 2 or shadows % 2:
        raise ConfigurationError(f"shadows is {shadows}; they come in pairs. Choose an even number from 2.")
    if not shared_spread and shadows < (4 if variant == "online" else 2):
        raise ConfigurationError(
            f"shadows is {shadows} and shared_spread false; one number has no spread. Choose more shadows."
        )
    spec = _shadow_spec(view.spec, tuning, passes, learning_rate)
    auxiliary = knows.auxiliary[: max(0, most_auxiliary)]
    pool = (*auxiliary, *view.candidates) if variant == "online" else auxiliary
    if len(pool) < 2:
        raise ConfigurationError(
            f"the pool of the variant {variant!r} has {len(pool)} texts and shadows need 2 or more to halve. Give more "
            "auxiliary texts."
        )

    def confidences(model: object) -> Tensor:
        return log_odds(
            model,  # type: ignore[arg-type]
            view.candidates,
            kind=view.task.kind,
            pad_token_id=knows.pad_id,
            batch_rows=batch_rows,
        )

    rows, inside = [], []
    for number, half in enumerate(_halves(len(pool), shadows, seed)):
        chosen: Sequence[Encoded] = [pool[place] for place in half.nonzero().flatten().tolist()]
        shadow = fine_tuned(
            knows.surrogate.whole, chosen, spec, pad_token_id=knows.pad_id, seed=1000 * (seed + 1) + number
        )
        rows.append(confidences(shadow))
        inside.append(half[len(auxiliary) :])
    found = confidences(view.model)
    if variant == "offline":
        return MemberGuess(scores=_above(found, torch.stack(rows), shared_spread))
    return MemberGuess(scores=_log_ratio(found, torch.stack(rows), torch.stack(inside), shared_spread))


def _shadow_spec(spec: SplitSpec, tuning: str, passes: float, learning_rate: float) -> SplitSpec:
    one_of("tuning", tuning, ("job", "lora", "all"))
    if tuning == "lora" and spec.tuning is None:
        spec = replace(spec, tuning=LoraSettings())
    elif tuning == "all":
        spec = replace(spec, tuning=None)
    if passes:
        spec = replace(spec, training=replace(spec.training, passes=passes, local_steps=0))
    if learning_rate:
        spec = replace(spec, optimizer=replace(spec.optimizer, learning_rate=learning_rate))
    return spec


def _halves(count: int, shadows: int, seed: int) -> list[Tensor]:
    """Return, per shadow, which of the pool it is trained on, bool [count]."""
    generator = torch.Generator().manual_seed(seed)
    halves = []
    for _ in range(shadows // 2):
        half = torch.zeros(count, dtype=torch.bool)
        half[torch.randperm(count, generator=generator)[: count // 2]] = True
        halves += [half, ~half]
    return halves


def _log_ratio(found_N: Tensor, rows_SN: Tensor, inside_SN: Tensor, shared: bool) -> Tensor:
    """Return log N(confidence; in) - log N(confidence; out) of every candidate."""
    fits = []
    for side_SN in (inside_SN, ~inside_SN):
        mean_N, spread_N = _fit(rows_SN, side_SN, shared)
        fits.append(-0.5 * ((found_N - mean_N) / spread_N).square() - spread_N.log())
    return fits[0] - fits[1]


def _above(found_N: Tensor, rows_SN: Tensor, shared: bool) -> Tensor:
    """Return how many standard deviations the confidence lies above that of models that did not see the candidate."""
    mean_N, spread_N = _fit(rows_SN, torch.ones_like(rows_SN, dtype=torch.bool), shared)
    return (found_N - mean_N) / spread_N


def _fit(rows_SN: Tensor, side_SN: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, each [N], of the confidences on one side."""
    count_N = side_SN.sum(0)
    mean_N = (rows_SN * side_SN).sum(0) / count_N
    squares_N = ((rows_SN - mean_N).square() * side_SN).sum(0)
    if shared:
        freedom = (count_N - 1).sum()
        # With one model on a side there is no spread around its mean: take that of the candidates.
        spread = (squares_N.sum() / freedom).sqrt() if freedom > 0 else mean_N.std()
        return mean_N, spread.clamp_min(_LEAST_SPREAD).expand_as(mean_N)
    return mean_N, (squares_N / (count_N - 1)).sqrt().clamp_min(_LEAST_SPREAD)
