"""What crosses between a token's owner and the hosts of its experts, as the session's agreement.

U different tokens that a host gets, R rows (a token once for each of the host's experts that it is routed to), D
hidden, G groups of numbers with a scale.

| operation  | request                                                 | reply                                       |
|------------|---------------------------------------------------------|---------------------------------------------|
| `forward`  | `hidden` [U, D], `row` [R], `expert` [R], `weight`? [R] | `output` [R, D], or [U, D] summed by token  |
| `backward` | `grad` [U, D], `weight`? [R]                            | `grad` [R, D] or [U, D], `weight_grad`? [R] |
| `step`     | nothing but counts                                      | nothing                                     |
| `finish`   | nothing                                                 | nothing                                     |
| `balance`  | `counts` [E + 2], of E experts, to the hub               | `counts` [E + 2], the sum over all parties  |

`row` says which of the tokens a row is, `expert` the expert's number in the whole layer; rows are sorted by expert.  A
token goes to a host once, however many of its experts it is routed to.  The router's weights go there in the backward
pass (the gradient of a row is the token's times its weight), and with ``combine="host"`` in the forward pass as well.
Under DP-SGD the forward request of training has `text` [U] as well: which row of the owner's batch each token is of,
since a row is what hosts clip.  Where experts have copies, the reply to a step says in plain values which step it was
and whose gradients it was taken with.  With `padding` all first dimensions are filled up
(`vflair_flower.experts.padding`).  With the codec ``"int8"`` each float tensor is followed by its scales,
`<name>_scale` [., G].  What hand-off adds is in `vflair_flower.experts.block_calls`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vflair_flower.errors import ConfigurationError
from vflair_flower.experts.balance import BALANCE, balance_operation, balances_jointly
from vflair_flower.experts.block_calls import block_operations
from vflair_flower.partition.structure import hidden_size
from vflair_flower.remote.protocol import AVERAGE, BACKWARD, FINISH, FORWARD, STEP
from vflair_flower.session import Agreement, OperationSpec, TensorSpec
from vflair_flower.spec import WIRE_DTYPES, SplitSpec

INDEX_DTYPE = torch.int32
_GROUP = 64


def expert_agreement(spec: SplitSpec, config: PreTrainedConfig, *, trained_parameters: int = 0) -> Agreement:
    """Return the agreement of a job whose experts are spread over the parties.

    Parameters
    ----------
    spec : SplitSpec
        Gives the wire's dtype or codec, and the largest batch and length.
    config : transformers.PreTrainedConfig
        Gives D and how many experts a token is routed to.
    trained_parameters : int
        How many parameters of the model without experts a party trains; for averaging at every step.
    """
    assert spec.experts is not None
    rows = max(spec.training.batch_size, spec.training.evaluation_batch_size)
    tokens = rows * spec.training.max_tokens
    if spec.task.kind.writes:
        tokens = max(tokens, spec.generation.max_rows * spec.generation.max_length)
    routed = tokens * int(config.get_text_config().num_experts_per_tok)
    width = hidden_size(config)
    row = TensorSpec("row", (INDEX_DTYPE,), (routed,))
    expert = TensorSpec("expert", (INDEX_DTYPE,), (routed,))
    weight = TensorSpec("weight", (torch.float32,), (routed,))
    text = (TensorSpec("text", (INDEX_DTYPE,), (tokens,)),) if spec.privacy is not None else ()
    weight_grad = TensorSpec("weight_grad", (torch.float32,), (routed,))

    def vectors(name: str, count: int) -> tuple[TensorSpec, ...]:
        if spec.experts is not None and spec.experts.codec == "int8":
            groups = width // math.gcd(width, _GROUP)
            scale = TensorSpec(f"{name}_scale", (torch.float32,), (count, groups), (False, True))
            return TensorSpec(name, (torch.int8,), (count, width), (False, True)), scale
        return (TensorSpec(name, (WIRE_DTYPES[spec.wire_dtype],), (count, width), (False, True)),)

    operations = {
        FORWARD: OperationSpec(
            (*vectors("hidden", tokens), row, expert, weight, *text),
            vectors("output", routed),
            frozenset({"weight", *(one.name for one in text)}),
        ),
        BACKWARD: OperationSpec(
            (*vectors("grad", tokens), weight),
            (*vectors("grad", routed), weight_grad),
            frozenset({"weight", "weight_grad"}),
        ),
        STEP: OperationSpec((), ()),
        FINISH: OperationSpec((), ()),
    }
    if spec.averaging == "step":
        gradient = TensorSpec("gradient", (torch.float32,), (trained_parameters,), (True,))
        operations[AVERAGE] = OperationSpec((gradient,), (gradient,))
    if spec.experts.semantics != "return":
        operations |= block_operations(spec, config)
    if balances_jointly(spec):
        operations[BALANCE] = balance_operation(config)
    return Agreement(operations=operations)


class Codec:
    """Turns float vectors into what crosses, and back.

    ``int8`` keeps 8 bits per number and, for each group of 64 (or the largest power of two that divides D), the scale
    by which the largest of them is 127.
    """

    def __init__(self, spec: SplitSpec) -> None:
        if spec.experts is None:
            raise ConfigurationError("experts is not set in the job's specification; set ExpertSettings().")
        self._int8 = spec.experts.codec == "int8"
        self._wire = WIRE_DTYPES[spec.wire_dtype]

    def pack(self, name: str, vectors_ND: Tensor) -> dict[str, Tensor]:
        """Return the tensors that stand for float vectors ``[N, D]``."""
        vectors_ND = vectors_ND.detach()
        if not self._int8:
            return {name: vectors_ND.to("cpu", self._wire)}
        groups_NGS = vectors_ND.float().unflatten(-1, (-1, math.gcd(vectors_ND.shape[-1], _GROUP)))
        scale_NG = groups_NGS.abs().amax(-1) / 127.0
        whole = torch.round(groups_NGS / scale_NG.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1))
        return {name: whole.flatten(-2).to("cpu", torch.int8), f"{name}_scale": scale_NG.to("cpu")}

    def unpack(self, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the vectors that `pack` was given, but for rounding."""
        packed = tensors[name]
        if not self._int8:
            return packed.to(dtype)
        scale_NG = tensors[f"{name}_scale"]
        groups_NGS = packed.float().unflatten(-1, (scale_NG.shape[-1], -1))
        vectors_ND: Tensor = (groups_NGS * scale_NG.unsqueeze(-1)).flatten(-2).to(dtype)
        return vectors_ND
