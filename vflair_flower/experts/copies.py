"""Copies of experts at several parties: whose answer counts, and whether they are still the same.

Copies are mirrored: in training every one of them is sent the same rows and gradients and takes the same steps, so that
they stay bit-equal without a parameter crossing.  E experts of a layer, C copies of each.
Invariant: which copy's answer counts depends on names and on who is lost, never on who was quicker.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vflair_flower.errors import SessionError
from vflair_flower.experts.placement import Placement
from vflair_flower.session.header import Meta


def preferred_copies(placement: Placement, owner: str) -> list[Tensor]:
    """Return, per layer, ``[E, C]``: the hosts of each expert in the order in which their answers count to an owner.

    The owner itself comes first where it holds a copy, then the expert's host, then those that follow it.  A row of
    fewer than C hosts is filled up with its last one; a layer without hosts has no rows.
    """
    own = placement.hosts.index(owner) if owner in placement.hosts else -1
    preferred = []
    for layer, homes in enumerate(placement.host_of):
        held = [placement.holders_of(layer, expert) for expert in range(len(homes))]
        ordered = [sorted(copies, key=lambda index: index != own) for copies in held]
        width = max(map(len, ordered), default=0)
        filled = [copies + copies[-1:] * (width - len(copies)) for copies in ordered]
        preferred.append(torch.tensor(filled, dtype=torch.int64).view(len(homes), width))
    return preferred


def refuse_parted(answers: Mapping[str, Meta]) -> None:
    """Raise SessionError if hosts answer a step in different words: their copies have parted.

    An owner that is lost between its words to two hosts leaves a step with its gradients at one of them, and without at
    the other.

    Parameters
    ----------
    answers : mapping of str to Meta
        By host, what it said of the step.
    """
    told = {host: (meta.get("steps"), meta.get("owners")) for host, meta in sorted(answers.items())}
    if len(set(told.values())) > 1:
        words = "; ".join(f"'{host}' took step {steps} for {owners}" for host, (steps, owners) in told.items())
        raise SessionError(
            f"copies of experts are no longer the same: {words}. A party was lost in the middle of a step; begin again "
            "from the last checkpoint."
        )
