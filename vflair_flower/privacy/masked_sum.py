"""The strategy's side of secure aggregation: passes sealed shares on, adds masked vectors up, and takes the masks off.

V length of a vector, uint64 ``[V]``.  Not here: Flower's messages (`vflair_flower.strategies.secure`).
Invariant: no seed and no key is put together for a party whose other secret was asked for, and nothing is unmasked
unless enough parties are left and every one of them can be reached from every other over shared masks.
"""

import secrets
from collections.abc import Iterable, Mapping

from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, public_key_to_bytes

from vflair_flower.errors import ConfigurationError, SessionError
from vflair_flower.privacy.masked_party import KEY, SEED, Keys, check_of, own_key, pair_key
from vflair_flower.privacy.masks import Arrays, Layout, Vector, decode, mask_of
from vflair_flower.secagg_settings import SecAggSettings


class MaskedSum:
    """The sum of one round.

    Parameters
    ----------
    settings : SecAggSettings
        The job's.
    job : str
        Its name.
    server_round : int
        From 1.
    asked : iterable of str
        The parties that the aggregator sampled.
    """

    def __init__(self, settings: SecAggSettings, *, job: str, server_round: int, asked: Iterable[str]) -> None:
        self.settings = settings
        self.job = job
        self.server_round = server_round
        self.asked = sorted(asked)
        self.lost: dict[str, str] = {}
        """Who was lost before training, and why."""
        self._keys: dict[str, Keys] = {}
        self._neighbours: dict[str, set[str]] = {}
        self._sealed: dict[str, dict[str, str]] = {}
        self._vectors: dict[str, Vector] = {}
        self._checks: dict[str, str] = {}
        self._layout: Layout | None = None
        self._shares: dict[str, dict[str, list[bytes]]] = {}
        if len(self.asked) < 2:
            raise ConfigurationError(
                f"the aggregator has sampled {len(self.asked)} party, and a sum over one party is that party's own. "
                "Sample more (fraction_train, min_train_nodes), or switch secure_aggregation off."
            )

    # ---- keys and shares ----

    def add_keys(self, keys: Mapping[str, Keys]) -> None:
        """Take the parties' public keys, and decide who shares masks with whom."""
        self._check(len(keys), len(self.asked), "have sent keys")
        self._keys = dict(keys)
        self._neighbours = ring(sorted(keys), self.settings.neighbours)

    @property
    def keys(self) -> dict[str, Keys]:
        """The public keys of all parties that sent some."""
        return self._keys

    @property
    def parties(self) -> int:
        """How many share masks in this round."""
        return len(self._keys)

    def keys_for(self, party: str) -> dict[str, Keys]:
        """Return the public keys that a party needs: its neighbours' and its own."""
        return {name: self._keys[name] for name in sorted({party, *self._neighbours[party]})}

    def add_sealed(self, sealed: Mapping[str, Mapping[str, str]]) -> None:
        """Take what each party sealed for its neighbours."""
        self._check(len(sealed), len(self.asked), "have shared their secrets")
        for party, texts in sealed.items():
            if set(texts) != self._neighbours[party]:
                raise SessionError(f"'{party}' has sealed shares for others than its neighbours; run the round again.")
        self._sealed = {party: dict(texts) for party, texts in sealed.items()}

    def sealed_for(self, party: str) -> dict[str, str]:
        """Return what was sealed for a party by those neighbours that have shared their secrets."""
        return {
            sender: texts[party] for sender, texts in sorted(self._sealed.items()) if party in self._neighbours[sender]
        }

    @property
    def ready(self) -> list[str]:
        """The parties that may be asked to train."""
        return sorted(self._sealed)

    # ---- the sum ----

    def add_vector(self, party: str, vector: Vector, *, layout: Layout, seed_check: str) -> None:
        """Take a party's masked vector; it must be laid out as everybody's."""
        if party not in self._sealed or party in self._vectors:
            raise SessionError(f"'{party}' has sent a vector out of turn; run the round again.")
        if (self._layout is not None and layout != self._layout) or vector.shape != (layout.size,):
            raise ConfigurationError(
                f"'{party}' wants other arrays or metrics summed than the rest; all must have the same names, shapes "
                "and dtypes. Let all parties train the same parameters and report the same metrics."
            )
        self._layout, self._vectors[party], self._checks[party] = layout, vector, seed_check

    def unmasking(self) -> dict[str, tuple[list[str], list[str]]]:
        """Return what to ask each party that is in the sum: whose vectors are in it too, and who was lost.

        Raises
        ------
        SessionError
            If too few parties are left; nothing has been unmasked then.
        """
        summed = set(self._vectors)
        self._check(len(summed), len(self.asked), "have sent their arrays")
        for party in sorted(summed):
            near = self._neighbours[party] | {party}
            self._check(len(summed & near), len(near), f"that '{party}' shares masks with are left")
        if _reached(min(summed), summed, self._neighbours) != summed:
            raise SessionError(
                "the parties that are left fall into groups without masks between them, and the sum over one group "
                "would be seen. Nothing was unmasked. Resume the job when more parties are on; another job could have "
                "more neighbours in secure_aggregation, or 0 for all."
            )
        near_ones = {party: (self._neighbours[party] & self._sealed.keys()) | {party} for party in summed}
        return {party: (sorted(near & summed), sorted(near - summed)) for party, near in near_ones.items()}

    def add_shares(self, given: Mapping[str, Mapping[str, str]]) -> None:
        """Take the shares that one party gave."""
        for party, share in given.items():
            kind = SEED if party in self._vectors else KEY
            if set(share) != {kind}:
                raise SessionError(f"a share of the {kind} of '{party}' was asked for, and something else came.")
            self._shares.setdefault(party, {}).setdefault(kind, []).append(bytes.fromhex(share[kind]))

    def total(self) -> tuple[Arrays, dict[str, float], int]:
        """Take all masks off the sum.

        Returns
        -------
        arrays, metrics, weight
            The weighted means, and the sum of the weights.

        Raises
        ------
        SessionError
            If a secret cannot be put together, or a mask is left.
        """
        assert self._layout is not None
        size, about = self._layout.size, (self.job, self.server_round)
        vectors = list(self._vectors.values())
        total = vectors[0].copy()
        for vector in vectors[1:]:
            total += vector
        for party in self._vectors:
            seed = self._together(party, SEED)
            if check_of(seed, *about, party) != self._checks[party]:
                raise SessionError(_not_together(party, SEED))
            total -= mask_of(own_key(seed, *about, party), size)
        for party in sorted(self._sealed.keys() - self._vectors.keys()):
            near = sorted(self._neighbours[party] & self._vectors.keys())
            if not near:
                continue
            private = self._together(party, KEY).decode(errors="replace")
            _check_key(party, private, self._keys[party]["mask"])
            for other in near:
                mask = mask_of(pair_key(private, self._keys[other]["mask"], *about, party, other), size)
                total = total - mask if other > party else total + mask
        return decode(total, self._layout, summed=len(vectors), settings=self.settings, parties=self.parties)

    def _together(self, party: str, kind: str) -> bytes:
        shares = self._shares.get(party, {}).get(kind, [])
        holders = len(self._neighbours[party]) + 1
        self._check(len(shares), holders, f"that hold a share of the {kind} of '{party}' have given it")
        try:
            return combine_shares(shares[: self.settings.needed(holders)])
        except ValueError as error:
            raise SessionError(_not_together(party, kind)) from error

    def _check(self, here: int, of: int, what: str) -> None:
        needed = self.settings.needed(of)
        if here < needed:
            why = "; ".join(f"{party}: {reason}" for party, reason in sorted(self.lost.items()))
            raise SessionError(
                f"only {here} of {of} parties {what}, and secure aggregation needs {needed} (its threshold is "
                f"{self.settings.threshold:.3g}). Nothing of round {self.server_round} was unmasked. Resume the job "
                "when more parties are on; another job could have a lower threshold, but above 1/2."
                + (f" Lost: {why}." if why else "")
            )


def ring(names: list[str], neighbours: int) -> dict[str, set[str]]:
    """Return who shares masks with whom: all with all, or each with its nearest on a ring that is shuffled.

    Parameters
    ----------
    names : list of str
        The parties.
    neighbours : int
        Even; 0 for all.

    Examples
    --------
    >>> {name: sorted(near) for name, near in ring(["a", "b", "c"], 0).items()}
    {'a': ['b', 'c'], 'b': ['a', 'c'], 'c': ['a', 'b']}
    """
    if neighbours == 0 or neighbours >= len(names) - 1:
        return {name: set(names) - {name} for name in names}
    shuffled = list(names)
    secrets.SystemRandom().shuffle(shuffled)
    steps = [step for distance in range(1, neighbours // 2 + 1) for step in (distance, -distance)]
    return {name: {shuffled[(at + step) % len(shuffled)] for step in steps} for at, name in enumerate(shuffled)}


def _reached(start: str, among: set[str], neighbours: Mapping[str, set[str]]) -> set[str]:
    reached, waiting = {start}, [start]
    while waiting:
        new = (neighbours[waiting.pop()] & among) - reached
        reached |= new
        waiting += sorted(new)
    return reached


def _check_key(party: str, private: str, public: str) -> None:
    try:
        fits = public_key_to_bytes(bytes_to_private_key(private.encode()).public_key()).decode() == public
    except ValueError:
        fits = False
    if not fits:
        raise SessionError(_not_together(party, KEY))


def _not_together(party: str, kind: str) -> str:
    return (
        f"the shares of the {kind} of '{party}' do not fit together: somebody gave a wrong one. The round's sum cannot "
        "be unmasked; run the round again."
    )
