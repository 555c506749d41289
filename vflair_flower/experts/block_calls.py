"""What crosses between a token's owner and its leads in hand-off: operations, the owner's calls, what comes back.

S sequences, T tokens, N = tokens of these that the lead leads, D hidden.

| operation        | request                                                        | reply                        |
|------------------|----------------------------------------------------------------|------------------------------|
| `block`          | `hidden` [S, T, D]; `attention_mask`?, `position_ids`?, `led`? | `hidden` [N, D], `lead`? [N] |
| `block-backward` | `grad` [N, D]                                                  | `grad` [S, T, D]             |

The last three of the request are [S, T]; `led` says for which tokens an output is wanted, where tokens are led.  `lead`
says who leads next, as a place among the parties in the order of their names; it is missing where the block has no
experts, and is [S] where whole sequences are led.
Invariant: an answer of another shape, or with numbers that are not finite, ends the call.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vflair_flower.errors import SessionError
from vflair_flower.experts.blocks import BlockInput
from vflair_flower.partition.structure import hidden_size
from vflair_flower.remote.protocol import MASK_DTYPE, POSITION_DTYPE
from vflair_flower.session import Caller, OperationSpec, Reply, TensorSpec
from vflair_flower.session.header import Meta
from vflair_flower.spec import WIRE_DTYPES, SplitSpec

BLOCK, BLOCK_BACKWARD = "block", "block-backward"
LEAD_DTYPE = torch.int32


def block_operations(spec: SplitSpec, config: PreTrainedConfig) -> dict[str, OperationSpec]:
    """Return what hand-off adds to a session's agreement."""
    rows, tokens = max(spec.training.batch_size, spec.training.evaluation_batch_size), spec.training.max_tokens
    width, wire = hidden_size(config), (WIRE_DTYPES[spec.wire_dtype],)

    def states(name: str) -> TensorSpec:
        return TensorSpec(name, wire, (rows, tokens, width), (False, False, True))

    def vectors(name: str) -> TensorSpec:
        return TensorSpec(name, wire, (rows * tokens, width), (False, True))

    flags = [TensorSpec(name, (MASK_DTYPE,), (rows, tokens)) for name in ("attention_mask", "led")]
    positions = TensorSpec("position_ids", (POSITION_DTYPE,), (rows, tokens))
    lead = TensorSpec("lead", (LEAD_DTYPE,), (rows * tokens,))
    return {
        BLOCK: OperationSpec(
            (states("hidden"), *flags, positions),
            (vectors("hidden"), lead),
            frozenset({"attention_mask", "led", "position_ids", "lead"}),
        ),
        BLOCK_BACKWARD: OperationSpec((vectors("grad"),), (states("grad"),)),
    }


@dataclass(frozen=True, kw_only=True)
class Share:
    """The tokens of a batch that one party leads.

    Parameters
    ----------
    place : int
        Of the party among the hosts.
    host : str
        Its name.
    rows_S : torch.Tensor
        Integer: the sequences that it needs.
    led_ST : torch.Tensor
        Bool: which of their tokens it leads.
    """

    place: int
    host: str
    rows_S: Tensor
    led_ST: Tensor

    def places_N(self) -> Tensor:  # noqa: N802 - the suffix is the shape
        """Return the places of the tokens that it leads among all of the batch, counted on over its sequences."""
        tokens = self.led_ST.shape[1]
        return (self.rows_S.unsqueeze(-1) * tokens + torch.arange(tokens))[self.led_ST]


@dataclass(frozen=True, kw_only=True)
class Led:
    """A lead's answer: outputs ``[N, D]``, and the next leads ``[N]`` or ``[S]`` if the block has experts."""

    call: int
    output_ND: Tensor
    lead: Tensor | None


class BlockCalls:
    """An owner's calls to leads.

    Parameters
    ----------
    link : Caller
        An open link; every call has its deadline.
    spec : SplitSpec
        The job.
    hosts : int
        How many parties there are.
    """

    def __init__(self, link: Caller, spec: SplitSpec, hosts: int) -> None:
        self._link, self._hosts = link, hosts
        self._wire = WIRE_DTYPES[spec.wire_dtype]
        self._calls = 0
        self._pool = ThreadPoolExecutor(hosts, thread_name_prefix=f"vflair-leads-{link.party}")

    def close(self) -> None:
        """Free the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forward(self, index: int, asked: Sequence[tuple[Share, BlockInput]], *, keep: bool) -> list[Led]:
        """Have leads run a block on their shares, all at once."""
        calls, futures = [], []
        for share, entered in asked:
            self._calls += 1
            calls.append(self._calls)
            tensors = {"hidden": entered.hidden_STD.detach().to("cpu", self._wire)}
            for name, tensor, dtype in (
                ("attention_mask", entered.mask_ST, MASK_DTYPE),
                ("position_ids", entered.positions_ST, POSITION_DTYPE),
                ("led", entered.led_ST, MASK_DTYPE),
            ):
                if tensor is not None:
                    tensors[name] = tensor.to("cpu", dtype)
            meta: Meta = {"block": index, "call": self._calls, "keep": keep}
            futures.append(self._pool.submit(self._link.call, share.host, BLOCK, tensors, meta))
        failures = [error for future in futures if (error := future.exception()) is not None]
        if failures:
            raise failures[0]
        return [
            self._read(share, entered, call, future.result())
            for (share, entered), call, future in zip(asked, calls, futures, strict=True)
        ]

    def backward(self, share: Share, call: int, grad_ND: Tensor) -> Tensor:
        """Return the gradient ``[S, T, D]`` of what a lead was sent."""
        tensors = {"grad": grad_ND.detach().to("cpu", self._wire)}
        reply = self._link.call(share.host, BLOCK_BACKWARD, tensors, {"call": call})
        grad_STD = reply.tensors["grad"]
        self._check(share, grad_STD, (*share.led_ST.shape, grad_ND.shape[1]), BLOCK_BACKWARD)
        return grad_STD

    def _read(self, share: Share, entered: BlockInput, call: int, reply: Reply) -> Led:
        like_STD = entered.hidden_STD
        output_ND, lead = reply.tensors["hidden"], reply.tensors.get("lead")
        self._check(share, output_ND, (int(share.led_ST.sum()), like_STD.shape[-1]), BLOCK)
        if lead is not None:
            count = len(output_ND) if entered.led_ST is not None else len(like_STD)
            if lead.shape != (count,) or not 0 <= int(lead.min()) <= int(lead.max()) < self._hosts:
                raise SessionError(
                    f"the lead '{share.host}' named {tuple(lead.shape)} next leads from {lead.unique().tolist()[:4]}, "
                    f"and ({count},) of 0 to {self._hosts - 1} were asked; it does not run this version, or lies."
                )
            lead = lead.long()
        return Led(call=call, output_ND=output_ND.to(like_STD), lead=lead)

    @staticmethod
    def _check(share: Share, vectors: Tensor, shape: tuple[int, ...], operation: str) -> None:
        if vectors.shape != shape or not bool(torch.isfinite(vectors).all()):
            what = "numbers that are not finite" if vectors.shape == shape else f"shape {tuple(vectors.shape)}"
            raise SessionError(f"the lead '{share.host}' answered '{operation}' with {what}, and {shape} was asked.")
