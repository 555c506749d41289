"""Compare a cut model with the whole one: logits, every gradient, several optimiser steps, what it writes.

B rows, T tokens.  Everything is compared bit for bit in float32 but gradients of parameters that both parties hold a
copy of, whose parts are summed in another order.
Invariant: whatever cannot be compared is no certificate; nothing is skipped without a word.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from vflair_flower.certificate.parties import LABELS, PARTY, Parties, checkpoint, open_parties, plan_of, trained
from vflair_flower.certificate.tiny import FIRST_WORD, IMAGE_TOKEN, LAST_WORD, VOCABULARY
from vflair_flower.errors import VflairError
from vflair_flower.partition import Mode, ModelSource, PartitionPlan
from vflair_flower.partition.structure import Part, stack_lengths
from vflair_flower.settings import TaskKind

STEPS = 3
NEW_TOKENS = 8
SHARED_GRADIENT_TOLERANCE = 1e-6
"""For parameters of which both parties hold a copy: their parts are summed in another order than in the whole model.

A part of the gradient's largest number, where that is above 1; all other gradients have to be equal."""

Tamper = Callable[[Parties], None]
Inputs = dict[str, Any]

_GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 4},
    "beam, several returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What the comparison of one family, task and mode found.

    Parameters
    ----------
    family, task, mode : str
        What was compared.
    logits_equal : bool
        The logits and the loss, bit for bit.
    max_gradient_error : float
        The largest difference of any gradient; infinite when one is missing.
    steps_equal : bool or None
        All weights after several AdamW steps; None where nothing could be stepped.
    generation_equal : bool or None
        Tokens of greedy, sampled and beam search, left-padded; None for tasks that write nothing.
    ok : bool
        Whether the cut is certified.
    remark : str
        What is particular, or what failed.
    """

    family: str
    task: str
    mode: str
    logits_equal: bool
    max_gradient_error: float
    steps_equal: bool | None
    generation_equal: bool | None
    ok: bool
    remark: str = ""

    def to_dict(self) -> dict[str, object]:
        """Return the row as plain values; an infinite error becomes None, which JSON has."""
        row = asdict(self)
        if not math.isfinite(self.max_gradient_error):
            row["max_gradient_error"] = None
        return row


def certify(
    family: str,
    config: PreTrainedConfig,
    kind: TaskKind,
    mode: Mode,
    *,
    plan: PartitionPlan | None = None,
    tamper: Tamper | None = None,
) -> Certificate:
    """Compare split with whole for one configuration, task and mode.

    Parameters
    ----------
    family : str
        Name for the row.
    config : transformers.PreTrainedConfig
        A tiny configuration of four blocks without dropout (`vflair_flower.certificate.tiny`).
    kind, mode
        The task and the mode.
    plan : PartitionPlan, optional
        The cut; 1|2|1 or 1|3 by default.
    tamper : callable, optional
        Spoils the open parties; a comparison that does not notice is worth nothing (tests/exact).
    """
    plan = plan or plan_of(mode)
    row: dict[str, Any] = {"family": family, "task": kind.value, "mode": mode.value}
    try:
        with checkpoint(config, kind) as source:
            return Certificate(**row, **_compare(source, kind, plan, tamper))
    except (VflairError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        text = f"{type(error).__name__}: {error}"
        failed: dict[str, Any] = {
            "logits_equal": False,
            "max_gradient_error": math.inf,
            "steps_equal": None,
            "generation_equal": None,
        }
        return Certificate(**row, **failed, ok=False, remark=text.splitlines()[0][:300])


def _compare(source: ModelSource, kind: TaskKind, plan: PartitionPlan, tamper: Tamper | None) -> dict[str, Any]:
    with open_parties(source, kind, plan) as parties:
        if tamper:
            tamper(parties)
        inputs = make_inputs(parties.whole.config, kind)
        whole, own = parties.whole(**inputs), parties.data_party(**inputs)
        logits_equal = torch.equal(whole.loss, own.loss) and all(
            torch.equal(a, b) for a, b in zip(_answers(whole), _answers(own), strict=True)
        )
        whole.loss.backward()
        own.loss.backward()
        error, gradients_fit, shared = _compare_gradients(parties)
        steps_equal = None if shared else _steps_equal(parties, kind)
        generation = _generation_differs(parties, kind)
    remark = ""
    if shared:
        with open_parties(source, kind, plan, frozen=shared) as parties:
            if tamper:
                tamper(parties)
            steps_equal = _steps_equal(parties, kind)
        remark = f"both parties hold a copy of {len(shared)} parameters; frozen in the steps"
    if generation:
        remark = f"other tokens: {generation}"
    return {
        "logits_equal": logits_equal,
        "max_gradient_error": error,
        "steps_equal": steps_equal,
        "generation_equal": None if generation is None else not generation,
        "ok": logits_equal and gradients_fit and steps_equal is True and not generation,
        "remark": remark,
    }


def _compare_gradients(parties: Parties) -> tuple[float, bool, list[str]]:
    """Return the largest error of any gradient, whether all are as they should, and which parameters both hold."""
    own, body = trained(parties.data_party), parties.server.pending_gradients(PARTY)
    shared = sorted(own.keys() & trained(parties.server.module).keys())
    worst, fit = 0.0, True
    for name, parameter in trained(parties.whole).items():
        parts = [body[name]] if name in body else []
        if name in own and (gradient := own[name].grad) is not None:
            parts.append(gradient)
        if parameter.grad is None or not parts:
            worst = worst if parameter.grad is None and not parts else math.inf
            continue
        error = float((sum(parts[1:], parts[0]) - parameter.grad).abs().max())
        allowed = SHARED_GRADIENT_TOLERANCE * max(1.0, float(parameter.grad.abs().max())) if name in shared else 0.0
        fit = fit and error <= allowed
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst, fit and math.isfinite(worst), shared


def _steps_equal(parties: Parties, kind: TaskKind) -> bool:
    whole, own, body = (trained(m) for m in (parties.whole, parties.data_party, parties.server.module))
    if whole.keys() != own.keys() | body.keys():
        return False
    for parameter in (*whole.values(), *own.values()):
        parameter.grad = None
    parties.server.drop_gradients(PARTY)
    optimizers = [parties.spec.optimizer.build(list(p.values())) for p in (whole, own)]
    for step in range(STEPS):
        inputs = make_inputs(parties.whole.config, kind, seed=step)
        for optimizer, model in zip(optimizers, (parties.whole, parties.data_party), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = parties.spec.optimizer.rate(step, STEPS)
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        parties.remote.step(step=step, total_steps=STEPS)
    return all(torch.equal(own.get(name, body.get(name)), parameter) for name, parameter in whole.items())  # type: ignore[arg-type]


@torch.no_grad()
def _generation_differs(parties: Parties, kind: TaskKind) -> str | None:
    """Return which ways of writing differ, "" if none does, or None if the task writes nothing."""
    if not kind.writes:
        return None
    inputs = make_inputs(parties.whole.config, kind, left=True)
    for name in ("labels", "position_ids", "use_cache"):
        inputs.pop(name, None)
    differ = []
    models = (parties.whole.eval(), parties.data_party.eval())
    for name, settings in _GENERATIONS.items():
        written = [_written(model, inputs, settings) for model in models]
        if not torch.equal(*written):
            differ.append(name)
    return ", ".join(differ)


def _written(model: PreTrainedModel, inputs: Inputs, settings: dict[str, Any]) -> Tensor:
    generate: Any = model.generate
    pad = model.config.get_text_config().pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        tokens: Tensor = generate(**inputs, max_new_tokens=NEW_TOKENS, pad_token_id=pad, eos_token_id=None, **settings)
    return tokens


def make_inputs(config: PreTrainedConfig, kind: TaskKind, *, left: bool = False, seed: int = 0) -> Inputs:
    """Return a ragged batch of three rows of made-up tokens with labels, as a model of the task takes it.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's; gives the pad token.
    kind : TaskKind
        Decides which labels.
    left : bool
        Whether the padding is on the left, with position ids where the model takes them.
    seed : int
        Of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = 3, 9
    ids_BT = torch.randint(FIRST_WORD, LAST_WORD, (rows, tokens), generator=generator)
    lengths = torch.tensor([7, 9, 5])[:, None]
    places = torch.arange(tokens)[None]
    mask_BT = (places >= tokens - lengths if left else places < lengths).long()
    ids_BT = ids_BT.masked_fill(mask_BT == 0, config.get_text_config().pad_token_id or 0)
    if kind.reads_whole_texts and Part.DECODER in stack_lengths(config):  # which pools at the end of the text
        ids_BT[torch.arange(rows), (mask_BT * places).argmax(-1)] = config.eos_token_id
    inputs: Inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if kind is TaskKind.IMAGE_TEXT_TO_TEXT:
        ids_BT[:, -5:-1] = IMAGE_TOKEN
        mask_BT[:, -5:] = 1
        inputs["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=generator)
    if kind is TaskKind.SEQUENCE_CLASSIFICATION:
        inputs["labels"] = torch.randint(len(LABELS), (rows,), generator=generator)
    elif kind is TaskKind.SEQUENCE_REGRESSION:
        inputs["labels"] = torch.randn(rows, generator=generator)
    elif kind is TaskKind.QUESTION_ANSWERING:
        inputs["start_positions"] = torch.tensor([1, 2, 0])
        inputs["end_positions"] = torch.tensor([3, 7, 4])
    elif kind is TaskKind.MASKED_LM:
        hidden = (torch.rand(rows, tokens, generator=generator) < 0.3) & mask_BT.bool()
        hidden[:, 4] = True
        inputs["labels"] = ids_BT.masked_fill(~hidden, -100)
        inputs["input_ids"] = ids_BT.masked_fill(hidden, VOCABULARY - 1)
    elif kind is TaskKind.SEQ2SEQ_LM:
        targets_BT = torch.randint(FIRST_WORD, LAST_WORD, (rows, tokens - 2), generator=generator)
        targets_BT[0, -3:] = -100
        inputs["labels"] = targets_BT
        # A T5 keeps a cache in training too if it is let: its keys then lie otherwise in memory, and the attention of a
        # trained position bias rounds otherwise.  A cut model keeps none where gradients are on.
        inputs["use_cache"] = False
    else:
        inputs["labels"] = ids_BT.masked_fill(mask_BT == 0, -100)
    return inputs


def _answers(output: Any) -> list[Tensor]:
    return [output[name] for name in ("logits", "start_logits", "end_logits") if output.get(name) is not None]
