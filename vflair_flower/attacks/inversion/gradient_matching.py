"""The backward half of BiSR: labels whose gradient at the upper cut is the one that came up; of a causal model, text.

B rows, T tokens, D hidden, V vocabulary.  The model party knows what it answered and the gradient of the party's loss
by it.  The loss is a cross-entropy, so with a copy of the tail the gradient is J^T (p - y) / N: p the tail's
probabilities, y the labels, N how many labels count in the batch.  It is linear in the soft labels, and no row's
gradient holds another row's label.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import one_hot

from vflair_flower.attacks.guesses import NOTHING
from vflair_flower.attacks.inversion.descent import RowDescent
from vflair_flower.attacks.inversion.matching import token_distances
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.attacks.view import Exchange, SplitView
from vflair_flower.partition import Mode

_LOG_SHARE = 4.0
_SURE = 0.5
_FAINT = 1e-3


def match_labels(
    surrogate: Surrogate, exchange: Exchange, guess_BT: Tensor | None = None, *, steps: int, rate: float
) -> Tensor:
    """Return the labels of a token classifier or causal model that explain an exchange's gradient.

    Parameters
    ----------
    surrogate : Surrogate
        Gives the tail.
    exchange : Exchange
        With an answer and its gradient.  In Head-Tail the answer is the logits, and nothing is left to be optimised.
    guess_BT : Tensor, optional
        Int64, labels to begin with; `NOTHING` where there is no guess.
    steps : int
        Of Adam.
    rate : float
        Adam's, on the logits of the soft labels; falls to 0.

    Returns
    -------
    Tensor
        Int64 [B, T], the class that each place's loss asks for; `NOTHING` where no loss seems to be.
    """
    assert exchange.answer is not None
    assert exchange.answer_grad is not None
    device = surrogate.device
    answer, wanted = exchange.answer.to(device), exchange.answer_grad.to(device)
    mask_BT = exchange.attention_mask_BT.to(device)
    if surrogate.plan.mode is Mode.HT:
        return _asked_for(-wanted / wanted.abs().amax().clamp_min(1e-30), answer.softmax(-1), mask_BT)
    answer.requires_grad_()
    positions_BT = None if exchange.position_ids_BT is None else exchange.position_ids_BT.to(device)
    felt_BT = mask_BT.bool() & (wanted.norm(dim=-1) > _FAINT * wanted.norm(dim=-1).amax())
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        logits_BTV = surrogate.tail(answer, mask_BT, positions_BT)
        guesses_BTV = logits_BTV.detach().log_softmax(-1)
        chances_BTV = guesses_BTV.exp()
        if guess_BT is not None:
            known = guess_BT.to(device)
            hot_BTV = one_hot(known.clamp_min(0), chances_BTV.shape[-1]) * (known >= 0)[..., None]
            guesses_BTV = guesses_BTV + _LOG_SHARE * hot_BTV
        soft = RowDescent(guesses_BTV, rate=rate, steps=max(1, steps))
        counted = torch.full((len(mask_BT), 1, 1), float(mask_BT.sum() - len(mask_BT)), device=device).log()
        log_count = RowDescent(counted, rate=rate / 10, steps=max(1, steps))
        for _ in range(steps):
            error_BTV = (chances_BTV - soft.value.softmax(-1)) * (-log_count.value).exp()
            made = torch.autograd.grad(logits_BTV, answer, error_BTV, create_graph=True, retain_graph=True)[0]
            apart = (token_distances(made, wanted, "mse") * felt_BT).sum()
            steps_of = torch.autograd.grad(apart, [soft.value, log_count.value], retain_graph=True)
            soft.step(steps_of[0])
            log_count.step(steps_of[1])
    return _asked_for(soft.value.detach().softmax(-1) - chances_BTV, chances_BTV, mask_BT)


def label_votes(
    view: SplitView, surrogate: Surrogate, guesses: list[Tensor], *, steps: int, rate: float
) -> list[Tensor]:
    """Return what the gradients of a causal model's training say about each row's tokens.

    Parameters
    ----------
    view : SplitView
        Of a causal model.
    surrogate : Surrogate
        Gives the tail.
    guesses : list of Tensor
        Int64 [T] for each row of the view: tokens to begin with.
    steps, rate
        As in `match_labels`.

    Returns
    -------
    list of Tensor
        Int64 [T] for each row: the token at a place is the label of the place before it; `NOTHING` at the first place
        and wherever there was no gradient or no loss.
    """
    votes: list[Tensor] = []
    for exchange in view.exchanges:
        masks = exchange.attention_mask_BT.bool()
        own = guesses[len(votes) : len(votes) + exchange.rows]
        if exchange.answer is None or exchange.answer_grad is None:
            votes += [torch.full_like(guess, NOTHING) for guess in own]
            continue
        next_BT = torch.full(masks.shape, NOTHING)
        for row, guess in enumerate(own):
            next_BT[row, masks[row]] = torch.cat([guess[1:], torch.tensor([NOTHING])])
        labels_BT = match_labels(surrogate, exchange, next_BT, steps=steps, rate=rate).cpu()
        votes += [
            torch.cat([torch.tensor([NOTHING]), labels[mask][:-1]])
            for labels, mask in zip(labels_BT, masks, strict=True)
        ]
    return votes


def _asked_for(more_BTV: Tensor, chances_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the class of which more is asked than the tail gives it, where it is most of what is missing."""
    most_BT, labels_BT = more_BTV.max(-1)
    missing_BT = 1 - chances_BTV.gather(-1, labels_BT[..., None])[..., 0]
    return torch.where((most_BT > _SURE * missing_BT) & mask_BT.bool(), labels_BT, NOTHING)
