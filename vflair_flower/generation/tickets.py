"""A ticket: the file with which a data party may enter a model party's session, once.

It holds no text and no tensor: where the hub listens, the party's one-time secret, and what both sides must agree on.
Whoever has it can take the party's place until it is used; keep it as a password.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedConfig

from vflair_flower.errors import ConfigurationError, ModelError
from vflair_flower.partition.structure import hidden_size, num_blocks

_NAMES_ONLY = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """The way into one session.

    Parameters
    ----------
    address, session, party, ticket : str
        Where the hub listens, the session there, the party's name and its one-time secret.
    spec : str
        JSON of `SplitSpec`; its `model` is where the model party found the model.
    model : str
        Fingerprint of the model's configuration.
    adapter : str
        Fingerprint of the merged adapter; empty without.
    deadline_s : float
        For every call, in seconds.
    root_certificates : str
        PEM text of who signed the hub's certificate; empty for a hub without TLS.
    allow_plaintext : bool
        Whether the hub listens unencrypted beyond loopback.
    """

    address: str
    session: str
    party: str
    ticket: str
    spec: str
    model: str
    adapter: str
    deadline_s: float
    root_certificates: str
    allow_plaintext: bool

    def to_json(self) -> str:
        """Return the ticket on one line."""
        return json.dumps(asdict(self))

    def write(self, path: Path) -> None:
        """Write the ticket, whole or not at all, readable by this user alone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.part")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self.to_json() + "\n")
        os.replace(draft, path)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; raise ConfigurationError for anything else."""
        try:
            values: dict[str, Any] = json.loads(text)
            known = {f.name: f.type for f in fields(cls)}
            if set(values) != set(known) or any(type(values[name]) is not kind for name, kind in known.items()):
                raise ValueError(f"it must hold {', '.join(sorted(known))}")
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"this is no ticket of `vflair serve`: {error}. Pass on its file unchanged; both sides need the same "
                "version of vflair-flower."
            ) from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a ticket's file; raise ConfigurationError if there is none."""
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"the ticket {path} cannot be read ({error}); name the model party's file."
            ) from error
        return cls.from_json(text)


def model_fingerprint(config: PreTrainedConfig) -> str:
    """Return a name for an architecture in all its sizes: equal configurations, equal names.

    Weights are not in it: no party has those of the others to compare with.
    """
    values = {k: v for k, v in config.to_dict().items() if k not in _NAMES_ONLY}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return f"{config.model_type}, {num_blocks(config)} blocks, {hidden_size(config)} wide, {digest}"


def check_model(ticket: Ticket, config: PreTrainedConfig, model: str) -> None:
    """Raise ModelError unless a party's model is the one that the ticket is for."""
    mine = model_fingerprint(config)
    if mine != ticket.model:
        raise ModelError(
            f"the model {model!r} is not the model party's: here {mine}; there {ticket.model}. The halves of two "
            "models would write nonsense. Name a copy of the model party's with --model."
        )
