"""A job's checkpoints at the strategy: one folder per finished round, the newest two kept.

A round's folder holds ``arrays.safetensors`` (the data parties' aggregated arrays), ``body.pt`` (the body's trained
state and optimisers, where the strategy holds it) and ``round.json``.  It appears whole or not at all.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vflair_flower.errors import CheckpointError

_KEPT_ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A finished round.

    Parameters
    ----------
    server_round : int
        The last finished round.
    spec : str
        JSON of the job's `SplitSpec`; a job can only go on with the same.
    arrays : dict[str, torch.Tensor]
        The data parties' aggregated arrays.
    body : dict or None
        `SegmentServer.state()`, or None where a node holds the body.
    history : list[dict]
        What is known of the rounds so far, as JSON values.
    ledger : str
        JSON of what has crossed so far.
    reports : dict[str, dict]
        Each party's newest report, as JSON values.
    """

    server_round: int
    spec: str
    arrays: dict[str, Tensor]
    body: dict[str, Any] | None
    history: list[dict[str, Any]] = field(default_factory=list)
    ledger: str = "[]"
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)


def save_checkpoint(root: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below `root` and remove old ones; returns its folder."""
    folder = root / f"round-{checkpoint.server_round:05d}"
    draft = root / f".{folder.name}.part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.arrays.items()}, draft / "arrays.safetensors")
    if checkpoint.body is not None:
        torch.save(checkpoint.body, draft / "body.pt")
    kept = ("server_round", "spec", "history", "ledger", "reports")
    about = {name: getattr(checkpoint, name) for name in kept}
    (draft / "round.json").write_text(json.dumps(about))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
    for old in _folders(root)[:-_KEPT_ROUNDS]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def load_checkpoint(root: Path, *, spec: str) -> Checkpoint | None:
    """Return the newest checkpoint below `root`, or None if no round was finished.

    Raises
    ------
    CheckpointError
        If it cannot be read, or was written with other settings than `spec`.
    """
    folders = _folders(root)
    if not folders:
        return None
    folder = folders[-1]
    try:
        about = json.loads((folder / "round.json").read_text())
        arrays = load_file(folder / "arrays.safetensors")
        body_file = folder / "body.pt"
        body = torch.load(body_file, map_location="cpu", weights_only=True) if body_file.exists() else None
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be read ({error}). Remove that folder to resume from the round before."
        ) from error
    if json.loads(about["spec"]) != json.loads(spec):
        odd = _differences(json.loads(about["spec"]), json.loads(spec))
        raise CheckpointError(
            f"the checkpoint {folder} was written with other settings: {'; '.join(odd)}. "
            "Resume with the settings of the job that wrote it."
        )
    return Checkpoint(arrays=arrays, body=body, **about)


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("round-*") if p.is_dir())


def _differences(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted(was.keys() | now.keys()):
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old!r} and is {new!r}")
    return found
