"""Adversarial training: a mapping at the cut that an imagined adversary, trained at the same time, reads badly.

B rows, T tokens, D hidden, V vocabulary, E size of a word embedding, N tokens of several rows, C candidates.
"""

from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gelu, layer_norm, normalize

from vflair_flower.errors import ConfigurationError
from vflair_flower.privacy.bottleneck import ReadsTokens, check_weight, own_states
from vflair_flower.privacy.defence import Moment, Needs, Place, Preparation, Scene, defence

_ROWS = 256
_WARM_UP_STEPS = 150
_WARM_UP_TOKENS = 256
_RATE = 2e-3


class _Mapping(nn.Module):
    """Add to every token's state what a small network makes of it; nothing at first."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, inner)
        self.second = nn.Linear(inner, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return mapped states, and what was added in deviations of the state's own numbers."""
        change: Tensor = self.second(gelu(self.first(layer_norm(hidden, hidden.shape[-1:]))))
        size = hidden.detach().std(-1, keepdim=True)
        return hidden + size * change, change


class _Adversary(nn.Module):
    """Guess the token behind a state: the candidate whose embedding is nearest to what a network makes of it."""

    def __init__(self, width: int, embedding: int, inner: int) -> None:
        super().__init__()
        self.straight = nn.Linear(width, embedding)
        self.first = nn.Linear(width, inner)
        self.second = nn.Linear(inner, embedding)
        self.sharpness = nn.Parameter(torch.tensor(10.0))

    def forward(self, hidden_ND: Tensor, table_CE: Tensor) -> Tensor:
        """Return a logit for every candidate, [N, C]."""
        read_ND = layer_norm(hidden_ND, hidden_ND.shape[-1:])
        guess_NE = self.straight(read_ND) + self.second(gelu(self.first(read_ND)))
        logits: Tensor = self.sharpness * normalize(guess_NE, dim=-1) @ normalize(table_CE, dim=-1).T
        return logits


@defence(
    "adversarial",
    places=(Place.IDS, Place.SMASHED),
    needs=Needs.OWN_TEXTS,
    paper="Pan et al., IEEE S&P 2020. The mapping is the identity plus a change, without a Sigmoid; the adversary "
    "names tokens, and its loss is a cross-entropy over them; the weight weighs privacy",
)
class Adversarial(ReadsTokens):
    """Send P(x) of each token x; P and the head are trained against an adversary that reads tokens from P(x).

    The adversary is trained on the party's own tokens, with an optimiser of its own: first on the states as they are,
    then `adversary_steps` at every forward pass of training.  It tells the true token from `candidates` others, drawn
    new every time.  Added to the loss is ``weight * (ln C - the adversary's cross-entropy)`` for every token that it
    reads better than by chance, so that nothing is gained by fooling it worse than chance, and
    ``utility * mean square of P(x) - x`` in deviations of x.  Tokens are read, and left as they are.

    It holds against adversaries like the imagined one, as far as measured, and P is no secret that would hold: P is
    deterministic, an adversary who has P can train an inverter through it, and what P only moves elsewhere that
    inverter finds.  Nothing is done about labels: use a defence of the returned gradient beside it.

    Parameters
    ----------
    scene : Scene
        See `Defence`.
    weight : float
        0 or more; of privacy, per nat.  0 trains P for the task alone.
    utility : float
        0 or more; of staying near x.
    inner : int
        Width of both networks' inner layer, 1 or more.
    candidates : int
        How many tokens the adversary tells apart, 2 to V, those of the batch among them.
    adversary_steps : int
        1 or more.

    Raises
    ------
    ConfigurationError
        A setting is out of range.
    """

    def __init__(
        self,
        scene: Scene,
        *,
        weight: float = 3.0,
        utility: float = 0.01,
        inner: int = 256,
        candidates: int = 1024,
        adversary_steps: int = 2,
    ) -> None:
        super().__init__(scene)
        self.weight = check_weight("weight", weight)
        self.utility = check_weight("utility", utility)
        if inner < 1:
            raise ConfigurationError(f"inner is {inner}; the networks' inner layer has 1 number or more.")
        if candidates < 2:
            raise ConfigurationError(f"candidates is {candidates}; an adversary tells 2 tokens apart or more.")
        if adversary_steps < 1:
            raise ConfigurationError(
                f"adversary_steps is {adversary_steps}; an adversary that does not learn is no measure. Choose 1 or "
                "more."
            )
        vocabulary, size = scene.embedding_VD.shape
        self.candidates = min(candidates, vocabulary)
        self.adversary_steps = adversary_steps
        self.mapping = _Mapping(scene.width, inner)
        # It has its own optimiser: the session's must not move it.
        self.adversary = _Adversary(scene.width, size, inner).requires_grad_(False)
        self._optimizer = torch.optim.Adam(self.adversary.parameters(), lr=_RATE)

    def prepare(self, preparation: Preparation) -> None:
        """Train the adversary on states as they are, so that the mapping meets one that can read."""
        pairs = list(own_states(preparation, rows=_ROWS))
        device = self.special_V.device
        ids_N = torch.cat([ids for ids, _ in pairs]).to(device)
        hidden_ND = torch.cat([hidden for _, hidden in pairs]).to(device)
        for _ in range(_WARM_UP_STEPS):
            chosen = torch.randint(
                len(ids_N), (_WARM_UP_TOKENS,), generator=self.scene.noise.on(device), device=device
            )  # fmt: skip
            self._learn(hidden_ND[chosen], ids_N[chosen])
        super().prepare(preparation)

    def smashed(self, hidden_BTD: Tensor, moment: Moment) -> Tensor:
        """Return mapped states, [B, T, D]."""
        sent_BTD, change_BTD = self.mapping(hidden_BTD.float())
        if moment.training:
            self._term = self._terms(sent_BTD, change_BTD, moment.mask_BT.bool())
        changed: Tensor = sent_BTD.to(hidden_BTD.dtype)
        return changed

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the adversary's optimiser, which is saved with its parameters."""
        return self._optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put back what `get_extra_state` returned."""
        self._optimizer.load_state_dict(state)

    def _terms(self, sent_BTD: Tensor, change_BTD: Tensor, mask_BT: Tensor) -> Tensor | None:
        """Let the adversary learn, and return what the loss gets of its success and of the mapping's change."""
        terms = []
        if self.utility:
            terms.append(self.utility * change_BTD[mask_BT].square().mean())
        text_BT, ids_N = self.text_of(mask_BT)
        if self.weight and len(ids_N):
            sent_ND = sent_BTD[text_BT]
            for _ in range(self.adversary_steps):
                self._learn(sent_ND.detach(), ids_N)
            read_N = self._read(dict(self.adversary.named_parameters()), sent_ND, ids_N)
            terms.append(self.weight * read_N.clamp_min(0).mean())
        return torch.stack(terms).sum() if terms else None

    def _learn(self, sent_ND: Tensor, ids_N: Tensor) -> None:
        """Take one step of the adversary's optimiser."""
        with torch.enable_grad():
            own = {name: one.detach().requires_grad_() for name, one in self.adversary.named_parameters()}
            gradients = torch.autograd.grad(-self._read(own, sent_ND, ids_N).mean(), list(own.values()))
        for parameter, gradient in zip(self.adversary.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _read(self, parameters: dict[str, Tensor], sent_ND: Tensor, ids_N: Tensor) -> Tensor:
        """Return by how many nats the adversary's cross-entropy is better than chance, for every token."""
        candidates_C, places_N = self._candidates(ids_N)
        table_CE = self.scene.embedding_VD[candidates_C].float()
        logits_NC = functional_call(self.adversary, parameters, (sent_ND.float(), table_CE))
        return log(len(candidates_C)) - cross_entropy(logits_NC, places_N, reduction="none")

    def _candidates(self, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return which tokens are told apart, [C], and where in them each true one stands."""
        true_C, places_N = ids_N.unique(return_inverse=True)
        missing = self.candidates - len(true_C)
        if missing <= 0:
            return true_C, places_N
        others = torch.ones(len(self.special_V), device=ids_N.device)
        others[true_C] = 0
        drawn = torch.multinomial(others, missing, generator=self.scene.noise.on(ids_N.device))
        return torch.cat([true_C, drawn]), places_N
