"""How an inverter is trained: on auxiliary texts sent through the adversary's own head, never on a victim's rows.

Where the adversary knows the defence, they go through its imitation, with new noise in every epoch.

B rows, T tokens, D hidden, V vocabulary, N tokens that one step tells apart.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vflair_flower.attacks.inversion.inverter import Inverter
from vflair_flower.attacks.knowledge import Knowledge
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.errors import DataError
from vflair_flower.settings import one_of
from vflair_flower.tasks import padded_ids

INVERTERS = ("linear", "gru", "namoe")
_BATCH_ROWS = 16
_RATE, _DECAY = 1e-3, 1e-5
_OTHER_TOKENS = 2048
_EXPERT_NOISE = (0.0, 0.25, 0.5, 1.0)
_STAGES = (1.0, 0.75, 0.2)  # experts, gate, all: BiSR's 20, 15 and 4 epochs

Batch = tuple[Tensor, Tensor, Tensor]
"""Tokens [B, T], mask [B, T] and what would have been sent of them, [B, T, D]."""


def train_inverter(knows: Knowledge, *, kind: str, epochs: int, texts: int, noise: float = 1.0) -> Inverter:
    """Train an inverter for the cut of the adversary's surrogate.

    Parameters
    ----------
    knows : Knowledge
        Gives the auxiliary texts and the head.
    kind : {"linear", "gru", "namoe"}
        See `vflair_flower.attacks.inversion.inverter`.
    epochs : int
        Passes over the texts; of NaMoE's three stages, those of the first.
    texts : int
        The most auxiliary texts to use.
    noise : float
        NaMoE: the standard deviation of the noise that its last expert is for, relative to the root mean square of the
        hidden states; the others are for none, a quarter and half of it.

    Raises
    ------
    DataError
        The adversary has no texts.
    """
    one_of("inverter", kind, INVERTERS)
    if not knows.auxiliary:
        raise DataError("the adversary has no auxiliary texts to train an inverter on. Give it some, or choose 'vmi'.")
    batches = list(_through_the_head(knows, texts))
    total = sum(float((hidden * mask[..., None]).square().sum()) for _, mask, hidden in batches)
    count = sum(int(mask.sum()) for _, mask, _ in batches) * knows.surrogate.hidden_size
    size = (total / count) ** 0.5
    experts = {"linear": 0, "gru": 1, "namoe": len(_EXPERT_NOISE)}[kind]
    inverter = Inverter(knows.surrogate.hidden_size, size=size, experts=experts).to(knows.surrogate.device)
    if kind == "namoe":
        _train_namoe(inverter, knows.surrogate, batches, epochs, noise * size)
    else:
        _train(
            inverter, knows.surrogate, batches, epochs, inverter.parameters(), lambda hidden_BTD: [(hidden_BTD, None)]
        )
    return inverter.eval()


def auxiliary_batches(knows: Knowledge, texts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens and masks, int64 [B, T], of the first auxiliary texts, texts of like length together."""
    device = knows.surrogate.device
    rows = sorted((row.input_ids for row in knows.auxiliary[:texts]), key=len)
    for start in range(0, len(rows), _BATCH_ROWS):
        ids_BT, mask_BT = padded_ids(rows[start : start + _BATCH_ROWS], pad_token_id=knows.pad_id)
        yield ids_BT.to(device), mask_BT.to(device)


def _through_the_head(knows: Knowledge, texts: int) -> Iterator[Batch]:
    for ids_BT, mask_BT in auxiliary_batches(knows, texts):
        with torch.no_grad():
            yield ids_BT, mask_BT, knows.surrogate.as_sent(ids_BT, mask_BT)


def _train_namoe(inverter: Inverter, surrogate: Surrogate, batches: list[Batch], epochs: int, noise: float) -> None:
    gate = inverter.gate
    assert gate is not None
    levels = [noise * share for share in _EXPERT_NOISE]
    stages = [max(1, round(share * epochs)) for share in _STAGES]

    def each_its_own(hidden_BTD: Tensor) -> list[tuple[Tensor, int | None]]:
        return [(_noisy(hidden_BTD, level), place) for place, level in enumerate(levels)]

    def any_amount(hidden_BTD: Tensor) -> list[tuple[Tensor, int | None]]:
        return [(_noisy(hidden_BTD, _drawn_level(levels)), None)]

    without_gate = [one for name, one in inverter.named_parameters() if not name.startswith("gate.")]
    _train(inverter, surrogate, batches, stages[0], without_gate, each_its_own)
    _train(inverter, surrogate, batches, stages[1], gate.parameters(), any_amount)
    _train(inverter, surrogate, batches, stages[2], inverter.parameters(), any_amount)


def _noisy(hidden_BTD: Tensor, level: float) -> Tensor:
    return hidden_BTD + level * torch.randn_like(hidden_BTD)


def _drawn_level(levels: list[float]) -> float:
    """Draw an amount of noise: none half of the time, else mostly between the experts' least and most."""
    drawn = float(torch.rand(()))
    if drawn < 4 / 8:
        return 0.0
    if drawn < 5 / 8:
        return 2 * levels[-1]
    return levels[1] + (levels[-1] - levels[1]) * float(torch.rand(()))


def _train(
    inverter: Inverter,
    surrogate: Surrogate,
    batches: list[Batch],
    epochs: int,
    parameters: Iterable[nn.Parameter],
    inputs_of: Callable[[Tensor], list[tuple[Tensor, int | None]]],
) -> None:
    trained = list(parameters)
    optimizer = torch.optim.Adam(trained, lr=_RATE, weight_decay=_DECAY)
    table_VD = surrogate.embedding
    inverter.train()
    for _ in range(epochs):
        for place in torch.randperm(len(batches)).tolist():
            ids_BT, mask_BT, hidden_BTD = batches[place]
            if surrogate.imitation is not None:  # noise that is seen twice is learnt by heart
                with torch.no_grad():
                    hidden_BTD = surrogate.as_sent(ids_BT, mask_BT)
            real_BT = mask_BT.bool()
            tokens_N, targets = _told_apart(ids_BT[real_BT], len(table_VD))
            loss = torch.zeros((), device=hidden_BTD.device)
            for noisy_BTD, expert in inputs_of(hidden_BTD):
                embeds_BTD = inverter(noisy_BTD, mask_BT, expert=expert)
                loss = loss + cross_entropy(inverter.logits(embeds_BTD[real_BT], table_VD[tokens_N]), targets)
            # Only what this stage trains gets a gradient.
            for one, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
                one.grad = gradient
            optimizer.step()


def _told_apart(ids_M: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return N tokens, among them all of a batch's, and where the batch's stand in them.

    A large vocabulary is drawn from: all of its tokens at every step would cost more than everything else.
    """
    if vocabulary <= _OTHER_TOKENS:
        return torch.arange(vocabulary, device=ids_M.device), ids_M
    others = torch.randint(vocabulary, (_OTHER_TOKENS,), device=ids_M.device)
    tokens_N, places = torch.cat([ids_M, others]).unique(return_inverse=True)
    return tokens_N, places[: len(ids_M)]
