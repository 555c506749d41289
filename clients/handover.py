"""A party's answer when it is asked for its part of a finished model: its experts of one layer, or its own model.

A party hands over what it was told to share, and nothing else.  What goes back is what the party would train on with.
"""

from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message, RecordDict
from torch import Tensor

from vflair_flower.clients.store import PartyStore
from vflair_flower.control import PartRequest
from vflair_flower.errors import ConfigurationError
from vflair_flower.experts.finished import finished_backbone, finished_experts
from vflair_flower.experts.loading import layers_and_placement
from vflair_flower.experts.parcels import to_records
from vflair_flower.partition import ModelSource
from vflair_flower.partition.sources import load_config
from vflair_flower.spec import SplitSpec

MODELS = "models"
"""Folder, in a party's own, of its own model and its experts."""
PARTS = ("experts", "backbone")


@dataclass(frozen=True, kw_only=True)
class Consent:
    """What a party hands over when it is asked."""

    experts: bool = False
    model: bool = False


def hand_over(message: Message, source: ModelSource, consent: Consent, *, state_dir: Path) -> Message:
    """Answer a wish for a part.

    Parameters
    ----------
    message : flwr.app.Message
        Sent by `CollaborativeMoE.export`; where the job averages, with the averaged arrays.
    source : ModelSource
        This party's copy of the model.
    consent : Consent
        What it shares.
    state_dir : pathlib.Path
        Where it keeps models.

    Raises
    ------
    ConfigurationError
        If this party does not share that part, or the message is not ours.
    """
    request = PartRequest.from_content(message.content)
    spec = SplitSpec.from_json(request.spec)
    _refuse(request, spec, consent)
    if request.only_ask:
        return Message(RecordDict(), reply_to=message)
    store = PartyStore(state_dir, job=request.job, party=request.party)
    saved = store.load(request.server_round, mapped=True)
    behind = request.server_round > 0 and not store.has(request.server_round)
    if request.part == "experts":
        # Where others have copies that have gone on without this party, those count.
        copied = spec.experts is not None and spec.experts.replicas > 1
        state = {} if behind and copied else _experts(request, spec, source, saved)
    else:
        arrays = next(iter(message.content.array_records.values()), None)
        given = arrays.to_torch_state_dict() if arrays else None if saved is None else saved["own"]
        state = finished_backbone(source, spec, given).state_dict()
    return Message(to_records(state), reply_to=message)


def _refuse(request: PartRequest, spec: SplitSpec, consent: Consent) -> None:
    if request.part not in PARTS or spec.experts is None:
        raise ConfigurationError(f"the message asks for {request.part!r}, and there are {' and '.join(PARTS)}.")
    if request.part == "experts" and not consent.experts:
        raise ConfigurationError(
            f"party '{request.party}' does not share its experts, so the whole model cannot be written. If it is to, "
            "construct it with ExpertParty(share_experts=True)."
        )
    if request.part == "backbone" and spec.averaging == "none" and not consent.model:
        raise ConfigurationError(
            f"party '{request.party}' does not share its own model, which the job keeps private. Name another party in "
            "export(model_of=...), or construct this one with ExpertParty(share_model=True)."
        )


def _experts(
    request: PartRequest, spec: SplitSpec, source: ModelSource, saved: dict[str, dict[str, dict[str, Tensor]]] | None
) -> dict[str, Tensor]:
    """Return this party's experts of one layer by the names of the whole model's parameters."""
    names, placement = layers_and_placement(load_config(source, spec.task), spec, request.parties)
    if not 0 <= request.layer < len(names):
        raise ConfigurationError(f"the message asks for layer {request.layer}, and {len(names)} have experts.")
    own = placement.experts_of(request.party)[request.layer]
    wanted = {each: own if each == names[request.layer] else () for each in names}
    trained = None if saved is None else saved["host"]["trained"]
    return dict(finished_experts(source, wanted, spec, trained).state_dict())
