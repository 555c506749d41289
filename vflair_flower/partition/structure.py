"""Find the parts of a transformers model that a cut needs: the stack of blocks, what lies before it and after it.

Nothing is changed here.  What differs between model families is one row in `FAMILIES`, never a class.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vflair_flower.errors import ModelError

BlockReturn = Callable[[Tensor], Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets one model family apart.

    Parameters
    ----------
    block_returns : callable
        Wraps a hidden state as a block of this family returns it; most return the bare tensor.
    encoder : bool
        Whether every token sees every other one: such a model writes no text, and its classifier sees one vector per
        text, where a decoder's classifies every token and pools afterwards.
    """

    block_returns: BlockReturn = field(default=lambda hidden_BTD: hidden_BTD)
    encoder: bool = False


FAMILIES: dict[str, Family] = {
    "bert": Family(encoder=True),
    "roberta": Family(encoder=True),
    **{name: Family() for name in ("gpt2", "llama", "mistral", "qwen2", "qwen3")},
}
"""Families whose cut is proven exact in tests/exact, by `config.model_type`."""


def family_of(config: PreTrainedConfig) -> Family:
    """Return the row of a model's family; raise ModelError if this version does not know the family."""
    name = config.get_text_config().model_type
    if name not in FAMILIES:
        raise ModelError(
            f"the model family is {name!r}, whose cut is not proven exact by this version; an inexact cut would train "
            f"a wrong model without a word. Known families: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[name]


def num_blocks(config: PreTrainedConfig) -> int:
    """Return the number of blocks of a model."""
    return int(config.get_text_config().num_hidden_layers)


def hidden_size(config: PreTrainedConfig) -> int:
    """Return D, the width of the hidden states that cross a cut."""
    return int(config.get_text_config().hidden_size)


def find_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name below `model.base_model`, and the list itself, of the model's blocks.

    Raises
    ------
    ModelError
        If there is not exactly one list of `num_hidden_layers` modules.
    """
    wanted = num_blocks(model.config)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.base_model.named_modules():
        nested = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == wanted and not nested:
            found[name] = module
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(found)} lists of {wanted} blocks ({', '.join(found) or 'none'}); a cut "
            "needs exactly one. Encoder-decoder models cannot be cut by this version."
        )
    return next(iter(found.items()))


@dataclass(frozen=True)
class Place:
    """A module and where it hangs, so that it can be replaced."""

    parent: nn.Module
    name: str
    module: nn.Module

    def replace(self, module: nn.Module) -> None:
        """Put another module in this place."""
        setattr(self.parent, self.name, module)

    @property
    def has_own_parameters(self) -> bool:
        """Whether the module itself, not only its children, holds parameters."""
        return next(self.module.parameters(recurse=False), None) is not None


def outside_stack(base: nn.Module, stack: str) -> tuple[list[Place], list[Place]]:
    """Return the places before and after the stack, in order of registration, parents before children.

    Parameters
    ----------
    base : torch.nn.Module
        The base model, without task head.
    stack : str
        Name of the stack below `base`.
    """
    before: list[Place] = []
    after: list[Place] = []
    bucket = before

    def walk(parent: nn.Module, prefix: str) -> None:
        nonlocal bucket
        for name, child in parent.named_children():
            path = prefix + name
            if path == stack:
                bucket = after
            elif stack.startswith(path + "."):
                walk(child, path + ".")
            else:
                bucket.extend(_below(parent, name, child))

    walk(base, "")
    return before, after


def _below(parent: nn.Module, name: str, module: nn.Module) -> Iterator[Place]:
    yield Place(parent, name, module)
    for child_name, child in module.named_children():
        yield from _below(module, child_name, child)


def task_head_places(model: PreTrainedModel) -> list[Place]:
    """Return the places of the task head: the model's children with parameters that are not the base model.

    The last one is the one whose output the model's own forward turns into logits and loss.
    """
    return [
        Place(model, name, child)
        for name, child in model.named_children()
        if child is not model.base_model and next(child.parameters(), None) is not None
    ]
