"""A party's side of secure aggregation: four stages, whose secrets live for one round.

| stage    | the party gets                        | and gives                                                   |
|----------|---------------------------------------|-------------------------------------------------------------|
| `keys`   | the round                             | two public keys: for masks, and for sealed shares           |
| `share`  | its neighbours' keys                  | to each, sealed: a share of its seed and of its mask key    |
| `mask`   | what neighbours sealed for it         | its vector + mask of the seed +- mask with each neighbour   |
| `unmask` | who is in the sum, and who is lost    | seed shares of the former, key shares of the latter         |

Masks with neighbours cancel in the sum; what a lost party left uncancelled comes from its key, and the masks of seeds,
which keep a late vector of a "lost" party covered, from the others' seeds.

It protects against a strategy that follows the protocol and looks at all it gets, together with fewer parties than are
needed to put shares together (`SecAggSettings.needed`).  Invariant: of one other party a share of the seed OR of the
key leaves, never both; a round is unmasked once; then all its secrets are forgotten.  Not covered: a strategy that lies
about who has which public key, or shows parties a round that is not real.  Nothing is signed.
"""

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from cryptography.fernet import InvalidToken
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from vflair_flower.errors import SessionError
from vflair_flower.privacy.masks import Vector, derive, mask_of
from vflair_flower.secagg_settings import SecAggSettings

Keys = dict[str, str]
"""A party's public keys, ``"mask"`` and ``"seal"``, as PEM text."""
COVER = "secagg"
SEED, KEY = "seed", "key"


@dataclass(kw_only=True)
class MaskedParty:
    """One party in one round.

    Parameters
    ----------
    party, job, server_round
        Who, and of what; all masks are bound to them.
    settings : SecAggSettings
        The job's, as this party knows them.
    """

    party: str
    job: str
    server_round: int
    settings: SecAggSettings
    parties: int = 0
    """All that share masks in this round, neighbours or not."""
    stage: str = "begun"
    _private: dict[str, str] = field(default_factory=dict)
    _seed: str = ""
    _public: dict[str, Keys] = field(default_factory=dict)
    _held: dict[str, dict[str, str]] = field(default_factory=dict)

    # ---- stages ----

    def keys(self) -> Keys:
        """Draw this round's keys and return the public ones."""
        self._step("begun", "keys")
        public: Keys = {}
        for purpose in ("mask", "seal"):
            private_key, public_key = generate_key_pairs()
            self._private[purpose] = private_key_to_bytes(private_key).decode()
            public[purpose] = public_key_to_bytes(public_key).decode()
        self._public[self.party] = public
        return public

    def share(self, public: Mapping[str, Keys], parties: int) -> dict[str, str]:
        """Return for each neighbour its shares of this party's secrets, sealed for it alone.

        Parameters
        ----------
        public : mapping
            The neighbours' public keys, and this party's own.
        parties : int
            All that share masks in this round.
        """
        self._step("keys", "shared")
        if public.get(self.party) != self._public[self.party]:
            self._refuse("the strategy has other public keys of this party than it gave")
        all_keys = [key for keys in public.values() for key in (keys["mask"], keys["seal"])]
        if len(set(all_keys)) != len(all_keys):
            self._refuse("two of the public keys are the same")
        if len(public) < 2 or parties < len(public):
            self._refuse(f"there are {parties} parties, {len(public) - 1} of them neighbours, and no one to hide among")
        self._public, self.parties = {name: dict(keys) for name, keys in public.items()}, parties
        self._seed = secrets.token_hex(32)
        holders, needed = sorted(public), self.settings.needed(len(public))
        seed_shares = create_shares(bytes.fromhex(self._seed), needed, len(holders))
        key_shares = create_shares(self._private["mask"].encode(), needed, len(holders))
        sealed = {}
        for holder, seed, key in zip(holders, seed_shares, key_shares, strict=True):
            shares = {SEED: seed.hex(), KEY: key.hex()}
            if holder == self.party:
                self._held[holder] = shares
                continue
            text = json.dumps([self.job, self.server_round, self.party, holder, shares])
            sealed[holder] = encrypt(self._seal_key(holder), text.encode()).decode()
        return sealed

    def open(self, sealed: Mapping[str, str]) -> None:
        """Open what the neighbours sealed for this party; masks are shared with exactly these.

        Raises
        ------
        SessionError
            If a text was changed, comes from someone else or from another round, or there are too few.
        """
        self._step("shared", "opened")
        for sender, text in sealed.items():
            if sender not in self._public or sender == self.party:
                self._refuse(f"'{sender}' is no neighbour of this party")
            try:
                *about, shares = json.loads(decrypt(self._seal_key(sender), text.encode()))
            except (InvalidToken, ValueError):
                about, shares = [], {}
            if about != [self.job, self.server_round, sender, self.party] or set(shares) != {SEED, KEY}:
                self._refuse(f"what '{sender}' sealed for this party was changed on the way, or belongs elsewhere")
            self._held[sender] = shares
        self._check_enough(self._held, "have shared their secrets")

    def mask(self, vector: Vector) -> Vector:
        """Return the vector under this party's masks; it is noise to whoever lacks shares."""
        self._step("opened", "masked")
        masked = vector + mask_of(self.own_key(bytes.fromhex(self._seed), self.party), len(vector))
        for other in sorted(set(self._held) - {self.party}):
            mask = mask_of(self.pair_key(self._private["mask"], self._public[other]["mask"], other), len(vector))
            masked = masked + mask if self.party > other else masked - mask
        return masked

    def seed_check(self) -> str:
        """Return what tells whether a seed that was put together from shares is this party's; gives nothing away."""
        return check_of(bytes.fromhex(self._seed), self.job, self.server_round, self.party)

    def unmask(self, summed: Iterable[str], lost: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the shares that unmask the sum, once, and forget this round.

        Parameters
        ----------
        summed, lost : iterable of str
            Of this party and its neighbours: whose vectors are in the sum, and whose never came.

        Returns
        -------
        dict
            By party a share, either of its seed or of its key.
        """
        if self.stage == "unmasked":
            self._refuse("this party has unmasked the round already")
        if self.stage != "masked":
            self._refuse(f"this party has sent no vector in the round (it is at '{self.stage}')")
        present, gone = set(summed), set(lost)
        both = sorted(present & gone)
        if both:
            self._refuse(f"both shares of '{both[0]}' are asked for, which together uncover its vector")
        if self.party not in present:
            self._refuse("this party has sent its vector and is said to be lost")
        odd = sorted((present | gone) - self._held.keys())
        if odd:
            self._refuse(f"this party holds no shares of '{odd[0]}'")
        self._check_enough(present, "are in the sum")
        given = {name: {SEED: self._held[name][SEED]} for name in sorted(present)}
        given |= {name: {KEY: self._held[name][KEY]} for name in sorted(gone)}
        self.stage, self._private, self._seed, self._held, self._public = "unmasked", {}, "", {}, {}
        return given

    # ---- keys of masks ----

    def own_key(self, seed: bytes, party: str) -> bytes:
        """Return the key of the mask that comes from a party's seed."""
        return own_key(seed, self.job, self.server_round, party)

    def pair_key(self, private: str, public: str, other: str) -> bytes:
        """Return the key of the mask that this party shares with another."""
        return pair_key(private, public, self.job, self.server_round, self.party, other)

    # ---- between messages ----

    def to_json(self) -> str:
        """Return everything, secrets included, as JSON text for this party's own keeping."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "MaskedParty":
        """Return what `to_json` wrote."""
        read = json.loads(text)
        return cls(**{**read, "settings": SecAggSettings(**read["settings"])})

    # ---- checks ----

    def _seal_key(self, other: str) -> bytes:
        private = bytes_to_private_key(self._private["seal"].encode())
        return generate_shared_key(private, bytes_to_public_key(self._public[other]["seal"].encode()))

    def _step(self, expected: str, following: str) -> None:
        if self.stage != expected:
            self._refuse(f"this party is at '{self.stage}', and the strategy asks for what follows '{expected}'")
        self.stage = following

    def _check_enough(self, present: Iterable[str], what: str) -> None:
        here, needed = len(set(present)), self.settings.needed(len(self._public))
        if here < needed:
            self._refuse(
                f"only {here} of {len(self._public)} parties that this one knows {what}, and {needed} are needed"
            )

    def _refuse(self, why: str) -> None:
        raise SessionError(
            f"'{self.party}' leaves the secure aggregation of round {self.server_round}: {why}. It gave nothing away; "
            "the round must be run again."
        )


def own_key(seed: bytes, job: str, server_round: int, party: str) -> bytes:
    """Return the key of the mask that comes from a party's seed."""
    return derive(seed, "own", job, server_round, party)


def check_of(seed: bytes, job: str, server_round: int, party: str) -> str:
    """Return the check of a party's seed."""
    return derive(seed, "check", job, server_round, party).hex()


def pair_key(private: str, public: str, job: str, server_round: int, one: str, other: str) -> bytes:
    """Return the key of the mask that two parties share, from one's private and the other's public key."""
    shared = generate_shared_key(bytes_to_private_key(private.encode()), bytes_to_public_key(public.encode()))
    return derive(shared, "pair", job, server_round, *sorted((one, other)))
