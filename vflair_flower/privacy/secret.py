"""A party's secret: what its defences' randomness is drawn from.

An adversary knows a job's seed, so noise that were drawn from it could be taken away again.
Invariant: nobody who lacks the secret can tell a draw; the same secret and the same words give the same draw.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import torch

_BYTES = 32


class Secret:
    """Draw from a key.

    torch's generators are not made for cryptography: who sees very many draws as they are may learn to foresee them.

    Parameters
    ----------
    key : bytes
        32 of them.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def fresh(cls) -> "Secret":
        """Return one that nobody has had."""
        return cls(secrets.token_bytes(_BYTES))

    @classmethod
    def repeatable(cls, seed: int, party: str) -> "Secret":
        """Return the one that a seed gives a party: for research only, since whoever knows the seed knows it."""
        return cls(hashlib.sha256(f"vflair-defences|{seed}|{party}".encode()).digest())

    @classmethod
    def kept(cls, path: Path) -> "Secret":
        """Return the one that a file holds; made at the first call, readable by its owner alone."""
        if path.exists():
            return cls(path.read_bytes())
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.part")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
        try:
            os.link(draft, path)  # fails where another process was first
        except FileExistsError:
            pass
        finally:
            draft.unlink()
        return cls(path.read_bytes())

    def generator(self, *about: str | int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a generator that depends on the secret and on words."""
        made = torch.Generator(device=device)
        return made.manual_seed(int.from_bytes(self.digest("|".join(map(str, about)).encode())[:8], "little") >> 1)

    def digest(self, data: bytes) -> bytes:
        """Return 32 bytes that depend on the secret and on data."""
        return hmac.digest(self._key, data, "sha256")

    def along(self, tokens: Iterable[int], about: str) -> list[bytes]:
        """Return 32 bytes for each token of a text, which depend on it and on those before it.

        A text that grows at its end, as when a model writes, gets the same bytes for what was there before; so a
        defence that draws from them says the same of a token however often it is sent.
        """
        found, state = [], self.digest(f"text|{about}".encode())
        for token in tokens:
            state = self.digest(state + token.to_bytes(8, "little", signed=True))
            found.append(state)
        return found


class Noise:
    """A stream of numbers from a secret, on any device.

    Parameters
    ----------
    secret : Secret
        What it depends on.
    about : str or int
        Words that name the stream; the same words give the same stream again.
    """

    def __init__(self, secret: Secret, *about: str | int) -> None:
        self._secret = secret
        self._about = about
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """Return the stream's generator for a device."""
        if device not in self._generators:
            self._generators[device] = self._secret.generator(*self._about, str(device), device=device)
        return self._generators[device]
