"""What a defence is: one class in one file, with one decorator.

    @defence("quantize", places=(Place.SMASHED, Place.GRADIENT), paper="...")
    class Quantize(Defence):
        def __init__(self, scene: Scene, *, bits: int = 8) -> None: ...
        def smashed(self, hidden_BTD: Tensor, moment: Moment) -> Tensor: ...

Keyword arguments behind the scene are its settings; they have defaults.  A defence overrides what it acts on and leaves
the rest as it is.  B rows, T tokens, D hidden, V vocabulary.
Invariant: a defence is applied by the session (`vflair_flower.privacy.shield`), never by the training loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vflair_flower.errors import ConfigurationError
from vflair_flower.named import Registry, Setting, read_name, read_settings, settings_of
from vflair_flower.partition import PartitionPlan
from vflair_flower.partition.structure import Part
from vflair_flower.privacy.secret import Noise, Secret
from vflair_flower.settings import TaskSettings
from vflair_flower.tasks import Encoded

_DefenceT = TypeVar("_DefenceT", bound="type[Defence]")


class Place(StrEnum):
    """Where a defence acts."""

    IDS = "token ids"
    EMBEDDING = "embeddings"
    SMASHED = "smashed data"
    GRADIENT = "returned gradient"
    LABELS = "labels"
    LOSS = "loss"
    ANSWER = "answer"


SENT_BY = {
    "hidden": frozenset({Place.IDS, Place.EMBEDDING, Place.SMASHED}),
    "encoder_hidden": frozenset({Place.IDS, Place.EMBEDDING, Place.SMASHED}),
    "grad": frozenset({Place.GRADIENT, Place.LABELS}),
    "encoder_grad": frozenset({Place.GRADIENT, Place.LABELS}),
}
"""Which places cover which tensor on the wire (`vflair_flower.remote.protocol`)."""


class Needs(StrEnum):
    """What a defence must be given before it can work."""

    NOTHING = "nothing"
    OWN_TEXTS = "the party's own texts, once"
    TRAINING = "training with the model"
    PUBLIC_TEXTS = "texts that are nobody's secret, once"


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """What a defence knows of the job, of its own part of the model, and of its party.

    Parameters
    ----------
    plan, task, num_blocks
        The cut and the task.
    width : int
        D at the cut.
    outputs : int
        Size of the last dimension of what comes back: D in Head-Body-Tail, classes or V in Head-Tail.
    embedding_VD : Tensor
        The party's table of word embeddings as the session begins with it, detached.
    special_ids : frozenset of int
        Tokens that are no text: they stay as they are.
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    secret : Secret
        The party's own.
    noise : Noise
        New for every session, from the secret.
    """

    plan: PartitionPlan
    task: TaskSettings
    num_blocks: int
    width: int
    outputs: int
    embedding_VD: Tensor
    special_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase
    secret: Secret = field(default_factory=Secret.fresh)
    noise: Noise = field(default_factory=lambda: Noise(Secret.fresh(), "noise"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Moment:
    """The forward call that a defence acts in.

    Parameters
    ----------
    mask_BT : Tensor
        int64, 1 for tokens and 0 for padding, of the tokens of this call.
    training : bool
        Whether gradients will come back.
    first : bool
        Whether no tokens of these rows were sent before: false in the later steps of writing with a cache.
    part : Part
        Of a model with an encoder and a decoder, which stack.
    """

    mask_BT: Tensor
    training: bool
    first: bool = True
    part: Part = Part.ONLY


@dataclass(frozen=True, kw_only=True, eq=False)
class Preparation:
    """What a defence that needs to learn something first may use.

    Parameters
    ----------
    encoded : sequence of Encoded
        The party's own training rows.
    pad_token_id : int
        What fills rows up.
    head : callable
        Makes hidden states [B, T, D] at the cut of tokens and their mask, int64 [B, T], without any defence, and sends
        nothing.
    head_changed : callable
        The same with word embeddings that a function, its third argument, makes of the model's own, [B, T, E].
    ask : callable
        Sends hidden states [B, T, D] of texts that are nobody's secret, with their mask, through the other party's
        segment, and returns its answer; what is sent is marked as ``"public"``.
    """

    encoded: Sequence[Encoded]
    pad_token_id: int
    head: Callable[[Tensor, Tensor], Tensor]
    head_changed: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
    ask: Callable[[Tensor, Tensor], Tensor]


class Defence(nn.Module):
    """Base of all defences: changes nothing.

    What has parameters that require gradients is trained with the model, and stays with the party.

    Parameters
    ----------
    scene : Scene
        What it may know.

    Attributes
    ----------
    text : str
        How the job names it, with its settings; it stands in ledger and observer table.
    """

    about: ClassVar["DefenceKind"]

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene
        self.text = self.about.name
        self.register_buffer("prepared", torch.tensor(False))
        self.prepared: Tensor

    @property
    def places(self) -> frozenset[Place]:
        """Where it acts with its settings; a defence that can be told to leave a place alone narrows this."""
        return frozenset(self.about.places)

    @property
    def ready(self) -> bool:
        """Whether it has all that it needs; until then nothing is sent."""
        return self.about.needs not in (Needs.OWN_TEXTS, Needs.PUBLIC_TEXTS) or bool(self.prepared)

    @property
    def mixes_rows(self) -> bool:
        """Whether what it makes of one row depends on others, of this batch or of earlier ones; DP-SGD refuses that."""
        return False

    def prepare(self, preparation: Preparation) -> None:
        """Learn from what a defence needs before the first message; sets `prepared`."""
        self.prepared.fill_(True)

    def ids(self, ids_BT: Tensor, moment: Moment) -> Tensor:
        """Return the tokens, int64 [B, T], that the model reads in place of the true ones."""
        return ids_BT

    def embedding(self, embeds_BTD: Tensor, moment: Moment) -> Tensor:
        """Return the word embeddings that the model goes on with."""
        return embeds_BTD

    def smashed(self, hidden_BTD: Tensor, moment: Moment) -> Tensor:
        """Return the hidden states that are sent; differentiable where gradients come back."""
        return hidden_BTD

    def answer(self, answer: Tensor, moment: Moment) -> Tensor:
        """Return what the model goes on with in place of what came back, [B, T, D] or logits; differentiable."""
        return answer

    def gradient(self, gradient: Tensor, moment: Moment) -> Tensor:
        """Return the gradient of what came back, of the same shape, as it is sent."""
        return gradient

    def labels(self, labels: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the labels, [B] or [B, T] with -100 where none is asked, that the loss is taken against."""
        return labels

    def order(self, rows: int, moment: Moment) -> Tensor | None:
        """Return the order in which rows are sent, a permutation int64 [B]; None for the order they are in.

        All that a call sends and gets back is permuted, mask and positions too; nothing else notices.  Of a text that
        is written with a cache it is asked once, and again when the number of rows changes.
        """
        return None

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss of the forward pass that just ended; None for nothing."""
        return None


@dataclass(frozen=True, kw_only=True)
class DefenceKind:
    """A registered defence.

    Parameters
    ----------
    name : str
        Its name.
    places : tuple of Place
        Where it acts.
    needs : Needs
        What it must be given first.
    paper : str
        Where it is from, and where it differs.
    make : type
        The class.
    """

    name: str
    places: tuple[Place, ...]
    needs: Needs
    paper: str
    make: type[Defence]

    @property
    def settings(self) -> Mapping[str, Setting]:
        """Its settings and their defaults."""
        return settings_of(self.make)


_DEFENCES: Registry[DefenceKind] = Registry("defence", "vflair_flower.privacy.defences")


def defence(
    name: str, *, places: Sequence[Place], paper: str, needs: Needs = Needs.NOTHING
) -> Callable[[_DefenceT], _DefenceT]:
    """Register a defence under a name; see `DefenceKind`.

    Raises
    ------
    ConfigurationError
        Another defence has this name, or a setting has no default.
    """

    def register(made: _DefenceT) -> _DefenceT:
        kind = DefenceKind(name=name, places=tuple(places), needs=needs, paper=paper, make=made)
        _DEFENCES.add(name, kind, kind.settings, module=made.__module__)
        made.about = kind
        return made

    return register


def defences() -> Mapping[str, DefenceKind]:
    """Return all defences by name: those of this package and those that were loaded."""
    return _DEFENCES.all()


def find_defence(name: str) -> DefenceKind:
    """Return a defence by name; raise ConfigurationError for an unknown one."""
    return _DEFENCES.find(name)


def parse_defences(text: str) -> list[tuple[DefenceKind, dict[str, Setting], str]]:
    """Read ``"dp:epsilon=8 quantize"``: defences in the order in which they act, each with its settings and its text.

    Raises
    ------
    ConfigurationError
        A defence or a setting is unknown, a value is of another kind, or a defence is named twice.
    """
    found: list[tuple[DefenceKind, dict[str, Setting], str]] = []
    for word in text.split():
        kind = find_defence(read_name(word))
        if any(kind is other for other, _, _ in found):
            raise ConfigurationError(f"the defence {kind.name!r} is named twice in {text!r}. Name it once.")
        found.append((kind, read_settings(word, kind.settings, of=f"defence {kind.name!r}"), word))
    return found


def open_defences(text: str, scene: Scene) -> tuple[Defence, ...]:
    """Make the defences that a text names, in order; raises ConfigurationError where they do not fit the scene."""
    made = []
    for kind, settings, word in parse_defences(text):
        one = kind.make(scene, **settings)
        one.text = word
        made.append(one)
    return tuple(made)
