"""The control: the gradient of one batch, as federated learning (FedSGD) and jobs of this library send it.

What an attack cannot read here it reads nowhere; what it reads here says that it works.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vflair_flower.attacks.gradients.view import GradientView
from vflair_flower.attacks.scoring import Truth
from vflair_flower.errors import ConfigurationError
from vflair_flower.experts.modules import expert_layers
from vflair_flower.partition import ModelSource, PartitionPlan, Segment, load_config, load_segment, make_trainable
from vflair_flower.partition.structure import num_blocks
from vflair_flower.settings import LoraSettings, TaskSettings, one_of
from vflair_flower.tasks import Encoded, Example, Secret, collate, encode_task, padding_token_id

WHAT = ("full", "adapters", "head-tail", "experts")
"""Whose gradients are seen: of all parameters, of adapters and a new task head, of head and tail, of some experts."""


def gradient_rehearsal(
    source: ModelSource,
    task: TaskSettings,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    what: str = "full",
    tuning: LoraSettings | None = None,
    plan: PartitionPlan | None = None,
    experts: Mapping[str, tuple[int, ...]] | None = None,
    dropout: bool = False,
    tells_lengths: bool = True,
    tells_labels: bool = True,
    seed: int = 0,
    secrets: Sequence[Secret] = (),
) -> tuple[GradientView, Truth]:
    """Compute the gradient of one batch.

    Parameters
    ----------
    source : ModelSource
        The checkpoint.
    task : TaskSettings
        What is trained.
    rows : sequence of examples
        The batch.
    tokenizer : PreTrainedTokenizerBase
        The model's.
    max_tokens : int
        Longer rows are cut.
    what : str
        One of `WHAT`.  ``"head-tail"`` is what the hub's operator gets of a party where a job averages at every step;
        ``"experts"`` what a host holds before its optimiser's step, under the names and in the shapes that it has.
    tuning : LoraSettings, optional
        Adapters; without, all parameters are trained.
    plan : PartitionPlan, optional
        For ``"head-tail"``: the cut; one block at each end by default.
    experts : mapping of str to tuple of int
        For ``"experts"``: by the name of each experts module, those that the host holds, ascending.
    dropout : bool
        Whether the model drops out as in training.
    tells_lengths, tells_labels : bool
        Whether the adversary knows the rows' lengths, and their labels.
    seed : int
        Of parameters that the checkpoint does not hold, and of dropout.
    secrets : sequence of Secret
        Planted in the rows; part of the truth.

    Raises
    ------
    ConfigurationError
        `what` is unknown, or lacks what it needs.
    """
    one_of("what", what, WHAT)
    if what == "adapters" and tuning is None:
        raise ConfigurationError("what is 'adapters' and there is no tuning. Say which adapters: LoraSettings(...).")
    if what == "experts" and (not experts or tuning is not None):
        raise ConfigurationError(
            "what is 'experts': say by `experts` which ones the host holds, and leave tuning out; adapters of experts "
            "are not read here."
        )
    blocks = num_blocks(load_config(source, task))
    loaded = load_segment(source, Segment.whole(blocks), task, seed=seed)
    model = make_trainable(loaded, tuning, task, seed=seed).train(dropout)
    encoded = encode_task(task.kind, rows, tokenizer, max_tokens=max_tokens)
    batch = collate(encoded, pad_token_id=padding_token_id(tokenizer))
    with torch.random.fork_rng(devices=[]) if dropout else nullcontext():
        if dropout:
            torch.manual_seed(seed)
        model(**batch.inputs).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    held: dict[str, tuple[int, ...]] = {}
    if what == "head-tail":
        own = _own_names(source, plan or PartitionPlan(), task, tuning, seed=seed)
        found = {name: gradient for name, gradient in found.items() if name in own}
    elif what == "experts":
        layers = expert_layers(loaded.model)
        held = {f"{layer}.{name}": (experts or {}).get(layer, ()) for layer in layers for name in _parts(model, layer)}
        held = {name: which for name, which in held.items() if which}
        found = {name: found[name][list(which)] for name, which in held.items()}
    view = GradientView(
        gradients={name: gradient.detach().to("cpu", torch.float32, copy=True) for name, gradient in found.items()},
        rows=len(encoded),
        lengths=tuple(batch.inputs["attention_mask"].sum(-1).tolist()) if tells_lengths else None,
        labels=_row_labels(task, encoded) if tells_labels else None,
        experts=held,
    )
    return view, Truth.of(encoded, tokenizer, secrets=secrets)


def _own_names(
    source: ModelSource, plan: PartitionPlan, task: TaskSettings, tuning: LoraSettings | None, *, seed: int
) -> set[str]:
    """Return the names of what a data party trains."""
    blocks = num_blocks(load_config(source, task))
    segment = load_segment(source, plan.data_party(blocks), task, seed=seed)
    model = make_trainable(segment, tuning, task, seed=seed)
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _parts(model: nn.Module, layer: str) -> list[str]:
    return [name for name, _ in model.get_submodule(layer).named_parameters(recurse=False)]


def _row_labels(task: TaskSettings, encoded: Sequence[Encoded]) -> Tensor | None:
    """Return the classes or numbers of whole texts; a language model's labels are the texts themselves."""
    if not task.kind.reads_whole_texts:
        return None
    return torch.tensor([row.label for row in encoded])  # type: ignore[union-attr]
