"""What defences that are trained with the model share: noise, information in nats, statistics, batches of own texts.

B rows, T tokens, D numbers of a vector, N tokens of several batches.
A channel that sends ``mean + deviation * n``, with n standard normal, tells on average at most
``KL(N(mean, deviation^2) | N(0, 1))`` nats of its input, whatever the input is (Alemi et al., ICLR 2017).
Invariant: nothing here is drawn from torch's global generator.
"""

from collections.abc import Iterator
from math import expm1, log

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vflair_flower.errors import ConfigurationError
from vflair_flower.privacy.defence import Defence, Moment, Preparation, Scene
from vflair_flower.tasks import padded_ids

GAIN_PACE, PACE = 20.0, 50.0
"""How much faster gains and deviations move than the optimiser's rate says: they go from one end of their range to the
other, where a weight of the model hardly moves."""
START = 0.01
"""The deviation that training begins with, where a number's own deviation is 1."""
_BATCH_ROWS = 16
_LEAST = 1e-6


def check_weight(name: str, value: float) -> float:
    """Return a weight of a loss; raise ConfigurationError unless it is 0 or more, and finite."""
    if not 0 <= value < float("inf"):
        raise ConfigurationError(f"{name} is {value}; it weighs a loss that is made small. Choose 0 or more.")
    return value


def standard_normal(like: Tensor, scene: Scene) -> Tensor:
    """Return numbers of a tensor's shape from the party's own stream."""
    return torch.empty_like(like).normal_(generator=scene.noise.on(like.device))


def nats(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return KL(N(mean, deviation^2) | N(0, 1)) of every number."""
    return 0.5 * (mean.square() + deviation.square() - 1) - deviation.log()


def over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over tokens, and over the numbers of each; values [B, T, ...], mask [B, T]."""
    chosen = values[mask.bool()]
    return chosen.mean() if chosen.numel() else values.sum() * 0.0


class ReadsTokens(Defence):
    """Base of defences that add to the loss what they see of the tokens behind the states.

    Parameters
    ----------
    scene : Scene
        See `Defence`.
    """

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        vocabulary = len(scene.embedding_VD)
        special_V = torch.zeros(vocabulary, dtype=torch.bool)
        special_V[[one for one in scene.special_ids if one < vocabulary]] = True
        self.register_buffer("special_V", special_V, persistent=False)
        self.special_V: Tensor
        self._ids_BT: Tensor | None = None
        self._term: Tensor | None = None

    def ids(self, ids_BT: Tensor, moment: Moment) -> Tensor:
        """Remember the tokens of this call."""
        self._ids_BT = ids_BT if moment.training else None
        return ids_BT

    def text_of(self, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return which tokens of this call are text, bool [B, T], and these tokens, int64 [N]."""
        assert self._ids_BT is not None, "the shield asks for tokens before it calls"
        text_BT = mask_BT.bool() & ~self.special_V[self._ids_BT]
        return text_BT, self._ids_BT[text_BT]

    def penalty(self) -> Tensor | None:
        """Return the terms of the last forward pass."""
        term, self._term = self._term, None
        return term


class Deviation(nn.Module):
    """A trained deviation for each number of a vector, above 0.

    Parameters
    ----------
    width : int
        How many numbers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift_D = nn.Parameter(torch.zeros(width))

    def forward(self, more: Tensor | float = 0.0) -> Tensor:
        """Return deviations, [D], or [..., D] if what depends on the input is added before they are made positive."""
        return softplus(log(expm1(START)) + PACE * self.shift_D + more).clamp_min(_LEAST)


class Standard(nn.Module):
    """Mean and deviation of every number, from the first tokens that are seen; 0 and 1 until then.

    They are fixed once enough tokens were seen, so that what is trained on them does not lose its ground.

    Parameters
    ----------
    width : int
        D.
    enough : int
        Tokens.
    """

    def __init__(self, width: int, *, enough: int = 4096) -> None:
        super().__init__()
        self.enough = enough
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("square_D", torch.zeros(width))
        self.seen: Tensor
        self.mean_D: Tensor
        self.square_D: Tensor

    @torch.no_grad()
    def look(self, vectors_ND: Tensor) -> None:
        """Take vectors into the mean and the deviation, unless enough were seen."""
        count = len(vectors_ND)
        if count == 0 or self.seen >= self.enough:
            return
        share = float(count / (self.seen + count))
        gap_D = vectors_ND.float().mean(0) - self.mean_D
        own_D = vectors_ND.float().var(0, correction=0)
        # Of two parts: the mean of their variances, and what lies between their means.
        self.square_D.lerp_(own_D, share).add_(gap_D.square(), alpha=share * (1 - share))
        self.mean_D.add_(gap_D, alpha=share)
        self.seen += count

    @property
    def deviation(self) -> Tensor:
        """Above 0: a number that never changes is left at its own scale."""
        spread_D = self.square_D.sqrt()
        return torch.where(spread_D > _LEAST, spread_D, torch.ones_like(spread_D))

    def apart(self, vectors: Tensor) -> Tensor:
        """Return vectors with mean 0 and deviation 1."""
        return (vectors - self.mean_D.to(vectors)) / self.deviation.to(vectors)

    def back(self, vectors: Tensor) -> Tensor:
        """Undo `apart`."""
        return vectors * self.deviation.to(vectors) + self.mean_D.to(vectors)


def own_states(preparation: Preparation, *, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, batch by batch, the tokens [N] of a party's own texts and their states at the cut [N, D].

    Parameters
    ----------
    preparation : Preparation
        What a defence is given.
    rows : int
        The most texts to use; they are taken evenly from all.
    """
    every = max(1, len(preparation.encoded) // rows)
    chosen = [row.input_ids for row in list(preparation.encoded)[::every][:rows]]
    for start in range(0, len(chosen), _BATCH_ROWS):
        ids_BT, mask_BT = padded_ids(chosen[start : start + _BATCH_ROWS], pad_token_id=preparation.pad_token_id)
        hidden_BTD = preparation.head(ids_BT, mask_BT)
        kept = mask_BT.bool()
        yield ids_BT[kept], hidden_BTD[kept.to(hidden_BTD.device)]
