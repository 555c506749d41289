"""Run single blocks of a party's own model, in whatever thread, and see what its routers choose.

S sequences, T tokens, N = tokens that a block is run for, D hidden, K experts per token, H hosts.  The forward pass is
transformers' own, so masks, positions and rotary angles are those of the whole model; all other blocks hand on what
they get.
Invariant: no state is shared between threads, so that a party may wait in the middle of its own pass while its blocks
are run for another.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vflair_flower.errors import PartitionError
from vflair_flower.experts.dispatch import ExpertCalls, ExpertChannel, RemoteExperts
from vflair_flower.experts.placement import Placement
from vflair_flower.partition.structure import family_of, find_stacks

SEQUENCE, TOKEN = "hand-off-sequence", "hand-off-token"
"""The two settings of `ExpertSettings.semantics` beside ``"return"``."""


class LentChannel(ExpertChannel):
    """Joins a model's layers to its party's own calls, and in threads that run it for another, to that one's."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._joined: ExpertCalls | None = None
        super().__init__()

    @property
    def calls(self) -> ExpertCalls | None:
        """What the layers call in this thread."""
        found: ExpertCalls | None = getattr(self._here, "calls", None) or self._joined
        return found

    @calls.setter
    def calls(self, calls: ExpertCalls | None) -> None:
        self._joined = calls

    @contextmanager
    def lent(self, calls: ExpertCalls) -> Iterator[None]:
        """Let the layers make another's calls in this thread, inside the block."""
        self._here.calls = calls
        try:
            yield
        finally:
            self._here.calls = None


@dataclass(frozen=True, kw_only=True)
class BlockInput:
    """What one block is run on.

    Parameters
    ----------
    hidden_STD : torch.Tensor
        Float.
    mask_ST : torch.Tensor or None
        Integer, 1 for tokens and 0 for padding.
    positions_ST : torch.Tensor or None
        Integer; the model's own where absent.
    led_ST : torch.Tensor or None
        Bool: for which tokens an output is wanted; None for all.
    """

    hidden_STD: Tensor
    mask_ST: Tensor | None
    positions_ST: Tensor | None
    led_ST: Tensor | None


@dataclass(kw_only=True)
class _Run:
    """What happens to one block that is run by itself, or to the blocks of a whole pass one after the other."""

    index: int | None
    entered: BlockInput | None = None
    output_STD: Tensor | None = None
    routing: tuple[int, Tensor, Tensor] | None = None
    """The layer's place among those with experts; each token's experts, [N, K], and their weights."""

    @property
    def led_tokens(self) -> Tensor | None:
        """Which of all tokens, counted on over the sequences, go to experts; None for all."""
        led_ST = None if self.entered is None else self.entered.led_ST
        return None if led_ST is None else led_ST.flatten()


Handed = Callable[[int, Tensor], Tensor | None]
"""Given a block's index and what goes in, what comes out of it elsewhere; None to run it here."""


class BlockRunner:
    """Lets single blocks of a model be run, and an owner's pass through it be led elsewhere.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As `load_backbone` returned it; its blocks are changed in place.
    placement : Placement
        Who hosts what.
    semantics : str
        Whether leads are chosen for sequences or for tokens.
    """

    def __init__(self, model: PreTrainedModel, placement: Placement, semantics: str) -> None:
        (stack,) = find_stacks(model)
        self.blocks: nn.ModuleList = stack.blocks
        self._host, self._family = stack.host, family_of(model.config)
        self.semantics, self._num_hosts = semantics, len(placement.hosts)
        self._host_of = [torch.tensor(layer) for layer in placement.host_of]
        self._here = threading.local()
        for index, block in enumerate(list(stack.blocks)):
            block.forward = partial(self._block, index, block.forward)
        for module in model.modules():
            if isinstance(module, RemoteExperts):
                module.register_forward_pre_hook(self._before_experts)
                module.register_forward_hook(self._after_experts)
        self.handed: Handed | None = None
        """Asked before each block of an owner's pass; None while no session is open."""
        self.begins: Callable[[dict[str, Any]], None] | None = None
        """Told what an owner's pass was called with."""
        stack.host.register_forward_pre_hook(self._begin, with_kwargs=True)

    def run(self, index: int, entered: BlockInput) -> tuple[Tensor, Tensor | None]:
        """Run one block.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor or None]
            The outputs ``[N, D]`` of the tokens that are wanted, and the next lead of each (or ``[S]``, of each
            sequence), as a place among the hosts; None if the block has no experts.
        """
        run, before = _Run(index=index, entered=entered), self._run
        self._here.run = run
        try:
            self._host(
                inputs_embeds=entered.hidden_STD.detach(),
                attention_mask=entered.mask_ST,
                position_ids=entered.positions_ST,
                use_cache=False,
            )
        finally:
            self._here.run = before
        assert run.output_STD is not None
        output_ND = run.output_STD.flatten(0, 1)
        if run.led_tokens is not None:
            output_ND = output_ND[run.led_tokens]
        return output_ND, self._leads(run, entered.hidden_STD.shape[:2], entered.mask_ST)

    def chosen(self, shape: torch.Size, mask_ST: Tensor | None) -> Tensor | None:
        """Return the next leads, as `run` does, after the block that this thread's pass has just run here."""
        run: _Run = self._here.whole
        return self._leads(run, shape, mask_ST)

    def _leads(self, run: _Run, shape: torch.Size, mask_ST: Tensor | None) -> Tensor | None:
        if run.routing is None:
            return None
        layer, expert_NK, weight_NK = run.routing
        host_NK = self._host_of[layer][expert_NK.cpu()]
        weight_NK = weight_NK.detach().to("cpu", torch.float64)
        if self.semantics == TOKEN:
            return host_NK.gather(1, weight_NK.argmax(-1, keepdim=True)).squeeze(-1)
        if mask_ST is not None:
            weight_NK = weight_NK * mask_ST.flatten().to("cpu", torch.float64).unsqueeze(-1)
        sequences = shape[0]
        sums_SH = torch.zeros(sequences, self._num_hosts, dtype=torch.float64)
        sums_SH.scatter_add_(1, host_NK.reshape(sequences, -1), weight_NK.reshape(sequences, -1))
        return sums_SH.argmax(-1)  # of equals, the first

    @property
    def _run(self) -> _Run | None:
        found: _Run | None = getattr(self._here, "run", None)
        return found

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._run is not None:
            return None
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise PartitionError(
                "the model was called with a key-value cache, and its blocks are led by many parties, who keep none. "
                "Pass use_cache=False, or train with semantics='return', with which texts can be written."
            )
        self._here.whole = _Run(index=None)
        if self.begins is not None:
            self.begins(kwargs)
        return args, {**kwargs, "use_cache": False}

    def _block(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self._run
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        if run is not None and index != run.index:
            return self._family.block_returns(hidden_BTD, args, kwargs)
        if run is None:
            elsewhere = None if self.handed is None else self.handed(index, hidden_BTD)
            if elsewhere is not None:
                return self._family.block_returns(elsewhere, args, kwargs)
            self._here.whole.routing = None
            return forward(*args, **kwargs)
        assert run.entered is not None
        hidden_STD = run.entered.hidden_STD
        args, kwargs = ((hidden_STD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_STD})
        output = forward(*args, **kwargs)
        run.output_STD = output[0] if isinstance(output, tuple) else output
        return output

    def _before_experts(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        run = self._run or self._here.whole
        if run.led_tokens is not None:  # nobody wants the others' outputs
            args = tuple(tensor[run.led_tokens] for tensor in args)
        run.routing = (module.layer, args[1].detach(), args[2].detach())
        return args

    def _after_experts(self, _module: nn.Module, _args: tuple[Tensor, ...], output_ND: Tensor) -> Tensor | None:
        run = self._run
        if run is None or run.led_tokens is None:
            return None
        empty_TD = output_ND.new_zeros(len(run.led_tokens), output_ND.shape[1])
        return empty_TD.index_copy(0, torch.nonzero(run.led_tokens).squeeze(-1), output_ND)
