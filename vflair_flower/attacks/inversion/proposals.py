"""Which tokens to try first: those whose embedding a linear map of the seen state points to.

N tokens of auxiliary texts, D hidden, E the width of embeddings, V vocabulary, K candidates.  The map is the ridge
regression of embeddings on states, over texts of the adversary's own; it decides an order, and starts an optimisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vflair_flower.attacks.inversion.matching import likeness
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.tasks import Encoded, padded_ids

_TEXTS = 256
_AT_ONCE = 32
_RIDGE = 1e-4


class Proposer:
    """Proposes embeddings and tokens for states at the cut.

    Parameters
    ----------
    knows : Knowledge
        Surrogate and auxiliary texts.  Without texts, and where states are as wide as embeddings, a state is taken for
        an embedding; else for their mean.
    """

    def __init__(self, knows: Knowledge) -> None:
        self._table_VE = knows.surrogate.embedding
        self._map: tuple[Tensor, Tensor, Tensor] | None = None
        texts = knows.auxiliary[:_TEXTS]
        if texts:
            states_ND, ids_N = auxiliary_states(knows.surrogate, texts)
            self._map = ridge(states_ND, self._table_VE[ids_N])

    @torch.no_grad()
    def embeddings(self, states_ND: Tensor) -> Tensor:
        """Return the embeddings that states point to, [..., E]."""
        if self._map is not None:
            mean_D, map_DE, offset_E = self._map
            return (states_ND - mean_D) @ map_DE + offset_E
        if states_ND.shape[-1] == self._table_VE.shape[-1]:
            return states_ND
        return self._table_VE.mean(0).expand(*states_ND.shape[:-1], -1).clone()

    def order(self, states_ND: Tensor) -> Tensor:
        """Return all tokens for each state, int64 [N, V], the likeliest first."""
        return likeness(self.embeddings(states_ND), self._table_VE).argsort(dim=-1, descending=True)


@torch.no_grad()
def auxiliary_states(surrogate: Surrogate, texts: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Return the states that a victim would have sent of texts, [N, D], and their tokens, int64 [N]."""
    device = surrogate.device
    ordered = sorted(texts, key=lambda text: len(text.input_ids))
    states: list[Tensor] = []
    for start in range(0, len(ordered), _AT_ONCE):
        rows = [text.input_ids for text in ordered[start : start + _AT_ONCE]]
        ids_BT, mask_BT = (one.to(device) for one in padded_ids(rows, pad_token_id=0))
        states.append(surrogate.as_sent(ids_BT, mask_BT)[mask_BT.bool()])
    return torch.cat(states), torch.tensor([token for text in ordered for token in text.input_ids], device=device)


def ridge(inputs_ND: Tensor, targets_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean that is taken off, the map, and the offset of a ridge regression, solved in float64."""
    inputs, targets = inputs_ND.double(), targets_NE.double()
    mean, offset = inputs.mean(0), targets.mean(0)
    inputs, targets = inputs - mean, targets - offset
    gram = inputs.T @ inputs
    gram += _RIDGE * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), device=gram.device)
    solved = torch.linalg.solve(gram, inputs.T @ targets)
    return mean.float(), solved.float(), offset.float()
