"""Learned inverters: a network that turns hidden states at the cut into embeddings, read out against the model's table.

B rows, T tokens, D hidden, V vocabulary, E experts.  One network in three forms: a linear layer alone (E = 0), with a
GRU beside it (E = 1), or with several, each for one amount of noise, and a gate that mixes them row by row (NaMoE).
Invariant: a logit is a scaled cosine with the token's embedding, so tokens that no auxiliary text has can be found too.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

_WIDTH = 256
_HEADS = 4
_DROPOUT = 0.1
_SHARPNESS = 16.0


class Inverter(nn.Module):
    """Embeddings [B, T, D] from hidden states [B, T, D].

    Parameters
    ----------
    hidden_size : int
        D.
    size : float
        The root mean square of the hidden states' numbers; they are divided by it.
    experts : int
        E.
    """

    def __init__(self, hidden_size: int, *, size: float, experts: int) -> None:
        super().__init__()
        self.size = size
        self.straight = nn.Linear(hidden_size, hidden_size)
        nn.init.eye_(self.straight.weight)  # blocks add to what they get: a state still holds its token's embedding
        nn.init.zeros_(self.straight.bias)
        self.experts = nn.ModuleList(nn.GRU(hidden_size, _WIDTH, batch_first=True) for _ in range(experts))
        self.join = nn.Linear(_WIDTH, hidden_size)
        self.dropout = nn.Dropout(_DROPOUT)
        self.gate = _Gate(hidden_size, experts) if experts > 1 else None
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(_SHARPNESS)))

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, *, expert: int | None = None) -> Tensor:
        """Return embeddings; by one expert alone if it is named."""
        scaled_BTD = hidden_BTD / self.size
        straight_BTD: Tensor = self.straight(scaled_BTD)
        if not self.experts:
            return straight_BTD
        if expert is not None or self.gate is None:
            mixed_BTW = self.experts[expert or 0](scaled_BTD)[0]
        else:
            weights_BE = self.gate(scaled_BTD, mask_BT)
            outputs_EBTW = torch.stack([one(scaled_BTD)[0] for one in self.experts])
            mixed_BTW = torch.einsum("be,ebtw->btw", weights_BE, outputs_EBTW)
        joined_BTD: Tensor = self.join(self.dropout(mixed_BTW))
        return straight_BTD + joined_BTD

    def logits(self, embeds: Tensor, table_ND: Tensor) -> Tensor:
        """Return a logit for each of N tokens, [..., N]."""
        return self.log_sharpness.exp() * (normalize(embeds, dim=-1) @ normalize(table_ND, dim=-1).T)


class _Gate(nn.Module):
    """How much each expert counts for a row, by attention over the row's own places."""

    def __init__(self, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.enter = nn.Linear(hidden_size, _WIDTH)
        self.attention = nn.MultiheadAttention(_WIDTH, _HEADS, batch_first=True)
        self.leave = nn.Linear(_WIDTH, experts)

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        entered_BTW = self.enter(hidden_BTD)
        attended_BTW, _ = self.attention(
            entered_BTW, entered_BTW, entered_BTW, key_padding_mask=mask_BT == 0, need_weights=False
        )
        mean_BW = (attended_BTW * mask_BT[..., None]).sum(1) / mask_BT.sum(-1, keepdim=True)
        weights_BE: Tensor = self.leave(mean_BW).softmax(-1)
        return weights_BE


@torch.no_grad()
def read(inverter: Inverter, hidden_BTD: Tensor, mask_BT: Tensor, table_VD: Tensor, *, choices: int = 1) -> Tensor:
    """Return the K likeliest tokens of each place, the best first, int64 [B, T, K]."""
    embeds_BTD = inverter(hidden_BTD, mask_BT)
    return torch.stack([inverter.logits(row_TD, table_VD).topk(choices, dim=-1).indices for row_TD in embeds_BTD])
