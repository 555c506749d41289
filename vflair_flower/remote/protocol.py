"""What crosses a cut, as the session's agreement: operations, tensors, dtypes and the largest shapes.

B batch, T tokens, D hidden, C classes, V vocabulary.

| operation  | request                                                        | reply                              |
|------------|----------------------------------------------------------------|------------------------------------|
| `forward`  | `hidden` [B, T, D], `attention_mask` [B, T], `position_ids`?   | `hidden` or (Head-Tail) `logits`   |
| `backward` | `grad`, shaped as forward's reply                              | `grad`? [B, T, D]                  |
| `step`     | nothing but counts                                             | nothing                            |
| `finish`   | nothing                                                        | nothing                            |
| `average`  | `gradient` [N], of all that a data party trains                | `gradient` [N], the parties' mean  |
"""

import torch
from transformers import PreTrainedConfig

from vflair_flower.partition.plan import Mode
from vflair_flower.partition.structure import family_of, hidden_size
from vflair_flower.session import Agreement, OperationSpec, TensorSpec
from vflair_flower.settings import TaskKind
from vflair_flower.spec import WIRE_DTYPES, SplitSpec

MODEL_PARTY = "model-party"
"""Name of the party that holds the body, at the hub or at a node of its own."""

AVERAGER = "averager"
"""Name of the hub's endpoint that averages gradients of heads and tails, in sessions that do."""

FORWARD, BACKWARD, STEP, FINISH, AVERAGE = "forward", "backward", "step", "finish", "average"
MASK_DTYPE, POSITION_DTYPE = torch.uint8, torch.int32


def returned_name(mode: Mode) -> str:
    """Return the name of the tensor that a forward call brings back."""
    return "logits" if mode is Mode.HT else "hidden"


def agreement_for(spec: SplitSpec, config: PreTrainedConfig, *, trained_parameters: int = 0) -> Agreement:
    """Return the agreement that all parties of a job hold each other to.

    Parameters
    ----------
    spec : SplitSpec
        Gives the cut, the wire's dtype, and the largest batch and length.
    config : transformers.PreTrainedConfig
        Gives D, C and V.
    trained_parameters : int
        N, how many parameters a data party trains; needed where gradients are averaged at every step.
    """
    rows = max(spec.training.batch_size, spec.training.evaluation_batch_size)
    tokens = spec.training.max_tokens
    wire = (WIRE_DTYPES[spec.wire_dtype],)
    hidden_BTD = (rows, tokens, hidden_size(config))
    answer: tuple[int, ...]
    fixed: tuple[bool, ...]
    if spec.plan.mode is Mode.HBT:
        answer, fixed = hidden_BTD, (False, False, True)
    elif spec.task.kind is TaskKind.CAUSAL_LM:
        answer, fixed = (rows, tokens, int(config.get_text_config().vocab_size)), (False, False, True)
    elif family_of(config).encoder:
        answer, fixed = (rows, len(spec.task.label_names)), (False, True)
    else:
        answer, fixed = (rows, tokens, len(spec.task.label_names)), (False, False, True)
    sent = TensorSpec("hidden", wire, hidden_BTD, (False, False, True))
    mask = TensorSpec("attention_mask", (MASK_DTYPE,), (rows, tokens), (False, False))
    positions = TensorSpec("position_ids", (POSITION_DTYPE,), (rows, tokens), (False, False))
    back = TensorSpec(returned_name(spec.plan.mode), wire, answer, fixed)
    operations = {
        FORWARD: OperationSpec((sent, mask, positions), (back,), frozenset({"position_ids"})),
        BACKWARD: OperationSpec(
            (TensorSpec("grad", wire, answer, fixed),),
            (TensorSpec("grad", wire, hidden_BTD, (False, False, True)),),
            frozenset({"grad"}),
        ),
        STEP: OperationSpec((), ()),
        FINISH: OperationSpec((), ()),
    }
    if spec.averaging == "step":
        gradient = TensorSpec("gradient", (torch.float32,), (trained_parameters,), (True,))
        operations[AVERAGE] = OperationSpec((gradient,), (gradient,))
    return Agreement(operations=operations)
