"""A finished job's adapter on one segment: each party loads, of the merged folder, what belongs to its own blocks."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vflair_flower.errors import CheckpointError
from vflair_flower.partition import Segment, load_trained_state, trained_state
from vflair_flower.partition.merging import TRAINED_FILE
from vflair_flower.settings import LoraSettings


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A merged adapter as a run writes it: LoRA on all segments, or all trained parameters.

    Parameters
    ----------
    tuning : LoraSettings or None
        None where all parameters were trained.
    tensors : dict[str, torch.Tensor]
        By their names in the whole model.
    fingerprint : str
        The same at both parties, if they have the same folder.
    """

    tuning: LoraSettings | None
    tensors: dict[str, Tensor]
    fingerprint: str

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        """Read ``adapter_model.safetensors`` with its configuration, or ``trained.safetensors``.

        Raises
        ------
        CheckpointError
            If neither is there, or cannot be read.
        """
        whole = folder / TRAINED_FILE
        weights = whole if whole.is_file() else folder / "adapter_model.safetensors"
        try:
            tuning = None
            if weights is not whole:
                settings = json.loads((folder / "adapter_config.json").read_text())
                targets, ada = settings["target_modules"], settings.get("peft_type") == "ADALORA"
                tuning = LoraSettings(
                    method="adalora" if ada else "dora" if settings.get("use_dora") else "lora",
                    rank=settings["target_r" if ada else "r"],
                    alpha=settings["lora_alpha"],
                    target_modules=tuple(sorted(targets)),
                )
            tensors = load_file(weights)
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} is no adapter of a run ({type(error).__name__}: {error}). Name the folder `adapter` of a "
                "run, with adapter_config.json and adapter_model.safetensors, or trained.safetensors."
            ) from error
        return cls(tuning=tuning, tensors=tensors, fingerprint=digest)


def load_own_part(model: nn.Module, segment: Segment, adapter: Adapter) -> None:
    """Put a segment's part of an adapter into it.

    Parameters
    ----------
    model : torch.nn.Module
        As `make_trainable` returned it for the adapter's `tuning`.
    segment : Segment
        What the model owns.
    adapter : Adapter
        The merged one.

    Raises
    ------
    CheckpointError
        If that part is not all there.
    """
    own = trained_state(model)
    missing = sorted(own.keys() - adapter.tensors.keys())
    if len(missing) == len(own) and not segment.embedding:
        return  # trained at the data parties alone; as drawn, LoRA changes nothing
    if missing:
        raise CheckpointError(
            f"the adapter lacks {len(missing)} tensors of this segment ({segment.describe()}), the first is "
            f"{missing[0]!r}. It was trained on another model or with other settings."
        )
    load_trained_state(model, {name: adapter.tensors[name] for name in own})
