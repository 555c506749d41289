"""AdaLoRA (Zhang et al., arXiv 2303.10512) on one segment: its budget of ranks, spent by PEFT where they matter most.

Where we differ from AdaLoRA on a whole model: each segment has a budget of its own (rank x adapted matrices), because
the importance of another party's matrices is not known; and the penalty that keeps P and Q orthogonal is a mean over
the segment's matrices.  In the first tenth of the job nothing is taken away, in the last fifth nothing any more.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel
from torch import Tensor, nn

from vflair_flower.errors import ConfigurationError

_WHOLE_BUDGET, _FINAL = 0.1, 0.2
_MOVING = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankBudget:
    """The ranks of one segment's AdaLoRA matrices.

    Parameters
    ----------
    model : peft.PeftModel
        The segment, tuned by ``method="adalora"``.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        base = model.base_model
        assert isinstance(base, AdaLoraModel)
        self._base: Any = base
        self._config: AdaLoraConfig = model.active_peft_config

    @classmethod
    def of(cls, model: nn.Module) -> "RankBudget | None":
        """Return a model's budget, or None if it is not tuned by AdaLoRA."""
        return cls(model) if isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel) else None

    def after_step(self, step: int, total_steps: int) -> None:
        """Take ranks away as the budget falls; between an optimiser's step and its `zero_grad`.

        Parameters
        ----------
        step, total_steps : int
            Which step (from 0) of how many has been taken.

        Raises
        ------
        ConfigurationError
            If the length of the job is not known, or too short.
        """
        if total_steps < 5:
            raise ConfigurationError(
                f"the job has {total_steps} optimiser steps, and AdaLoRA spreads its budget over at least 5. Set "
                "PartySession.total_steps in a training loop of your own, train longer, or use LoRA."
            )
        self._config.total_step = total_steps
        self._config.tinit, self._config.tfinal = int(_WHOLE_BUDGET * total_steps), int(_FINAL * total_steps)
        self._config.deltaT = max(1, total_steps // 100)
        self._base.update_and_allocate(step)

    def add_penalty(self) -> None:
        """Add the gradient of the penalty on matrices that are not orthogonal, which PEFT adds to a loss."""
        matrices = {n: p for n, p in self._model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
        for name, matrix in matrices.items():
            leaf = matrix.detach().requires_grad_()
            with torch.enable_grad():
                gram = leaf @ leaf.T if ".lora_A." in name else leaf.T @ leaf  # [r, in] and [out, r]
                penalty = torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
            (gradient,) = torch.autograd.grad(penalty * (self._config.orth_reg_weight / len(matrices)), [leaf])
            matrix.grad = gradient if matrix.grad is None else matrix.grad + gradient

    def state(self) -> dict[str, object]:
        """Return what a checkpoint needs."""
        allocator = self._base.rankallocator
        moving = {name: {key: t.clone() for key, t in getattr(allocator, name).items()} for name in _MOVING}
        return {**moving, "rank_pattern": self._config.rank_pattern}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        for name in _MOVING:
            moving: dict[str, Tensor] = {key: tensor.clone() for key, tensor in state[name].items()}
            setattr(self._base.rankallocator, name, moving)
        self._config.rank_pattern = state["rank_pattern"]
