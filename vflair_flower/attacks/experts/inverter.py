"""A learned inverter: from what an expert gets of a token to the token, trained through the public model.

N tokens, T tokens of a text, D hidden, V vocabulary, W hidden width of the inverter.  One inverter per layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vflair_flower.attacks.experts.public import PublicModel
from vflair_flower.attacks.experts.view import HostView
from vflair_flower.attacks.guesses import TextGuess
from vflair_flower.attacks.inversion.matching import forbid
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.registry import Goal, attack
from vflair_flower.errors import DataError
from vflair_flower.settings import TaskKind, one_of
from vflair_flower.tasks import Encoded, padded_ids

MODELS = ("linear", "mlp", "gru")
_TEXTS_AT_ONCE = 32


@attack(
    "host-inversion",
    goal=Goal.TEXT,
    sees=HostView,
    paper="SIP of BiSR, CCS 2024, arXiv 2409.00960, at the inputs of experts; there a GRU over whole texts at a cut",
    kinds=(TaskKind.CAUSAL_LM,),
)
def host_inversion(
    view: HostView,
    knows: Knowledge,
    *,
    seed: int = 0,
    model: str = "mlp",
    width: int = 256,
    epochs: int = 10,
    rate: float = 2e-3,
) -> TextGuess:
    """Train an inverter per layer on auxiliary texts, and read every token with it.

    Parameters
    ----------
    view, knows, seed
        See `vflair_flower.attacks.registry`; a row of the guess is a moment.
    model : {"linear", "mlp", "gru"}
        A token by itself through one or two maps; or tokens in the order in which they were seen, through a GRU that
        was trained on texts from which those are missing that this coalition would not have seen.
    width : int
        W.
    epochs : int
        Passes over the auxiliary texts.
    rate : float
        Adam's; falls to 0 along a cosine.

    Raises
    ------
    DataError
        There are no auxiliary texts.
    """
    public = PublicModel(knows.surrogate)
    inverters = {
        layer: train_inverter(
            public,
            layer,
            knows.auxiliary,
            model=model,
            width=width,
            epochs=epochs,
            rate=rate,
            held=view.held(layer) if model == "gru" else (),
            pad_id=knows.pad_id,
        )
        for layer in view.layers
    }
    found = []
    for moment in view.moments:
        with torch.no_grad():
            scores_NV = inverters[moment.layer](moment.tokens_ND.to(public.device))
        found.append(forbid(scores_NV, knows.special_ids).argmax(-1).cpu())
    return TextGuess(ids=tuple(found))


class Inverter(nn.Module):
    """Scores of all tokens for each of some hidden states in a row, [N, D] to [N, V]."""

    def __init__(self, model: str, hidden: int, vocabulary: int, width: int) -> None:
        one_of("model", model, MODELS)
        super().__init__()
        self.mean_D = nn.Buffer(torch.zeros(hidden))
        self.scale_D = nn.Buffer(torch.ones(hidden))
        self.gru = nn.GRU(hidden, width, bidirectional=True, batch_first=True) if model == "gru" else None
        first = nn.Sequential(nn.Linear(hidden, width), nn.GELU()) if model == "mlp" else nn.Identity()
        inner = {"linear": hidden, "mlp": width, "gru": hidden + 2 * width}[model]
        self.first, self.last = first, nn.Linear(inner, vocabulary)

    def fit_scale(self, states_ND: Tensor) -> None:
        """Remember mean and deviation of the states."""
        self.mean_D.copy_(states_ND.mean(0))
        self.scale_D.copy_(states_ND.std(0).clamp_min(1e-6))

    def forward(self, states_ND: Tensor) -> Tensor:
        """Return scores [N, V]."""
        scaled_ND = (states_ND - self.mean_D) / self.scale_D
        if self.gru is not None:
            around_ND, _ = self.gru(scaled_ND.unsqueeze(0))
            scaled_ND = torch.cat([scaled_ND, around_ND.squeeze(0)], dim=-1)
        scores_NV: Tensor = self.last(self.first(scaled_ND))
        return scores_NV


def train_inverter(
    public: PublicModel,
    layer: int,
    auxiliary: Sequence[Encoded],
    *,
    model: str,
    width: int,
    epochs: int,
    rate: float,
    held: Sequence[int] = (),
    pad_id: int = 0,
) -> Inverter:
    """Return an inverter of one layer, trained on texts; with `held`, on those of their tokens that hosts would see."""
    if not auxiliary:
        raise DataError("there are no auxiliary texts, and an inverter is trained on some. Give the adversary texts.")
    batches = []
    for start in range(0, len(auxiliary), _TEXTS_AT_ONCE):
        rows = [row.input_ids for row in auxiliary[start : start + _TEXTS_AT_ONCE]]
        ids_BT, mask_BT = padded_ids(rows, pad_token_id=pad_id)
        entered = public.entered(ids_BT, mask_BT, layers=(layer,))[layer]
        kept_BT = mask_BT.bool().to(public.device)
        if held:
            kept_BT &= torch.isin(entered.expert_BTK, torch.tensor(held, device=public.device)).any(-1)
        if bool(kept_BT.any()):
            batches.append((entered.hidden_BTD[kept_BT], ids_BT.to(public.device)[kept_BT]))
    inverter = Inverter(model, batches[0][0].shape[1], public.vocabulary, width)
    inverter.to(public.device)
    inverter.fit_scale(torch.cat([states_ND for states_ND, _ in batches]))
    optimizer = torch.optim.Adam(inverter.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * len(batches)))
    for _ in range(epochs):
        for index in torch.randperm(len(batches)).tolist():
            states_ND, ids_N = batches[index]
            optimizer.zero_grad()
            nn.functional.cross_entropy(inverter(states_ND), ids_N).backward()
            optimizer.step()
            schedule.step()
    return inverter.eval()
