"""The public mixture-of-experts model in the adversary's hands: what its experts get, and which of them get it.

B rows, T tokens, K experts per token, D hidden, V vocabulary.  Invariant: it holds no text and no tensor of a session.
"""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.errors import ModelError
from vflair_flower.experts.modules import expert_modules, num_experts


@dataclass(frozen=True, kw_only=True, eq=False)
class Entered:
    """What came to one layer's experts: `hidden_BTD` and the experts of each token, `expert_BTK`."""

    hidden_BTD: Tensor
    expert_BTK: Tensor


class _Deep(Exception):  # noqa: N818 - no error: how a forward pass ends at the layer that is asked for
    pass


class PublicModel:
    """A surrogate's whole model, looked at where its experts are.

    Parameters
    ----------
    surrogate : Surrogate
        Of a mixture-of-experts model.
    """

    def __init__(self, surrogate: Surrogate) -> None:
        self.model = surrogate.whole
        self.config = surrogate.config
        self.device = surrogate.device
        self.experts = num_experts(surrogate.config)
        self.vocabulary = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        self._modules = list(expert_modules(self.model).values())
        if not self._modules:
            raise ModelError("the surrogate has no experts. Give one of the mixture-of-experts model that is attacked.")

    @torch.no_grad()
    def entered(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, *, layers: Collection[int], cache: Any = None
    ) -> dict[int, Entered]:
        """Return what comes to the experts of some layers; the pass ends at the last of them."""
        found: dict[int, Entered] = {}
        last, shape = max(layers), ids_BT.shape

        def look(layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if layer in layers:
                hidden, expert = (arg.reshape(*shape, -1) for arg in args[:2])
                found[layer] = Entered(hidden_BTD=hidden, expert_BTK=expert)
            if layer == last:
                raise _Deep

        with ExitStack() as stack:
            for layer, module in enumerate(self._modules):
                stack.enter_context(module.register_forward_pre_hook(partial(look, layer)))
            try:
                more = {} if cache is None else {"past_key_values": cache}
                mask = None if mask_BT is None else mask_BT.to(self.device)
                self.model(input_ids=ids_BT.to(self.device), attention_mask=mask, use_cache=cache is not None, **more)
            except _Deep:
                return found
        raise AssertionError("a forward pass did not come by the layer that was asked for")

    def states_of_each(self, layer: int, *, batch: int = 2048) -> Tensor:
        """Return what comes to a layer's experts for each token of the vocabulary alone in a row, [V, D]."""
        ids_V1 = torch.arange(self.vocabulary).unsqueeze(1)
        parts = [self.entered(part, layers=(layer,))[layer].hidden_BTD[:, 0] for part in ids_V1.split(batch)]
        return torch.cat(parts)

    @torch.no_grad()
    def next_log_probs(self, ids_BT: Tensor) -> Tensor:
        """Return the log-probability of each next token after rows of equal length, [B, V]."""
        logits_BV = self.model(input_ids=ids_BT.to(self.device), use_cache=False).logits[:, -1]
        log_probs_BV: Tensor = logits_BV.float().log_softmax(-1)
        return log_probs_BV
