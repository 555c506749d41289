"""Which party hosts which experts: a pure function of the settings and the parties' names, the same at every party."""

from collections.abc import Sequence
from dataclasses import dataclass

from vflair_flower.errors import ConfigurationError
from vflair_flower.settings import ExpertSettings


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Who hosts what.

    Parameters
    ----------
    hosts : tuple[str, ...]
        The parties, by name.
    host_of : tuple[tuple[int, ...], ...]
        Per layer, for each expert the index of its host; empty for a layer that every party has in its own model.
    replicas : int
        How many hosts hold each expert.
    opted_out : tuple[int, ...]
        The indices of hosts whose experts nobody calls; they hold no copies of others'.
    """

    hosts: tuple[str, ...]
    host_of: tuple[tuple[int, ...], ...]
    replicas: int = 1
    opted_out: tuple[int, ...] = ()

    def holders_of(self, layer: int, expert: int) -> tuple[int, ...]:
        """Return the indices of a spread expert's hosts: its own, then those with a copy, in the order of names."""
        first, n = self.host_of[layer][expert], len(self.hosts)
        if first in self.opted_out:
            return (first,)
        ring = ((first + step) % n for step in range(n))
        return tuple(index for index in ring if index not in self.opted_out)[: self.replicas]

    def hosts_of(self, layer: int, expert: int) -> tuple[str, ...]:
        """Return the names of the hosts of an expert: its own, then those with a copy."""
        return tuple(self.hosts[index] for index in self.holders_of(layer, expert))

    def experts_of(self, host: str) -> tuple[tuple[int, ...], ...]:
        """Return, per layer, the experts that a host holds, copies included, ascending."""
        index = self.hosts.index(host)
        return tuple(
            tuple(expert for expert in range(len(homes)) if index in self.holders_of(layer, expert))
            for layer, homes in enumerate(self.host_of)
        )

    @property
    def called(self) -> tuple[str, ...]:
        """The hosts whose experts are called: all that have not opted out."""
        return tuple(host for index, host in enumerate(self.hosts) if index not in self.opted_out)

    @property
    def spread(self) -> tuple[int, ...]:
        """The layers whose experts are at hosts, ascending."""
        return tuple(layer for layer, homes in enumerate(self.host_of) if homes)


def local_places(settings: ExpertSettings, layers: int) -> frozenset[int]:
    """Return which of a model's layers with experts every party has in its own model; refuse all of them."""
    first, last = settings.local_ends
    if first + last >= layers and first + last:
        raise ConfigurationError(
            f"local_layers is {settings.local_layers}, and the model has {layers} layers with experts; none would be "
            f"left to spread. Keep fewer than {layers} layers in all, or train without spread experts."
        )
    return frozenset((*range(first), *range(layers - last, layers)))


def place_experts(settings: ExpertSettings, hosts: Sequence[str], *, layers: int, experts: int) -> Placement:
    """Spread every layer's experts over the parties.

    ``"round-robin"`` deals them one after the other, beginning with another party in each layer, so that uneven shares
    even out.  ``"capacity"`` gives each party as many as its capacity says of the whole (largest remainder, at least
    one), in a row.  ``"table"`` is what the settings say.  Layers that are every party's own count as layers, and have
    no hosts, whatever a table says of them.

    Parameters
    ----------
    settings : ExpertSettings
        Placement, capacities, table, replicas, who has opted out.
    hosts : sequence of str
        The parties; their order does not matter.
    layers, experts : int
        Layers with experts, and experts of each.

    Raises
    ------
    ConfigurationError
        If there are more parties than experts, or more copies than parties, or the settings name others than them, or
        no layer is left to spread.
    """
    local = local_places(settings, layers)
    names = tuple(sorted(hosts))
    n = len(names)
    if not 1 <= n <= experts:
        raise ConfigurationError(
            f"{n} parties are to host the {experts} experts of each layer; every party hosts at least one. Take fewer "
            "parties."
        )
    odd = [party for party in settings.opted_out if party >= n]
    if odd or settings.replicas > n - len(settings.opted_out):
        raise ConfigurationError(
            f"replicas is {settings.replicas} and opted_out {settings.opted_out}, and there are {n} parties; copies of "
            f"an expert are at different parties that have not opted out. Number parties from 0 to {n - 1}, and let at "
            "least as many as replicas host."
        )
    if settings.placement == "round-robin":
        host_of = tuple(tuple((e + layer) % n for e in range(experts)) for layer in range(layers))
    elif settings.placement == "capacity":
        shares = shares_of(settings.capacities, n, experts)
        one_layer = tuple(index for index, count in enumerate(shares) for _ in range(count))
        host_of = (one_layer,) * layers
    else:
        host_of = settings.table
        if len(host_of) != layers or any(len(layer) != experts for layer in host_of):
            raise ConfigurationError(
                f"the experts' table has {len(host_of)} layers, the first of {len(host_of[0]) if host_of else 0} "
                f"experts; the model has {layers} of {experts}. Give one number for each expert of each layer."
            )
        odd = sorted({host for layer in host_of for host in layer if not 0 <= host < n})
        if odd:
            raise ConfigurationError(
                f"the experts' table names host {odd[0]}, and there are {n} parties. Number them from 0 to {n - 1}, in "
                "the order of their names."
            )
    host_of = tuple(() if layer in local else homes for layer, homes in enumerate(host_of))
    return Placement(
        hosts=names, host_of=host_of, replicas=settings.replicas, opted_out=tuple(sorted(settings.opted_out))
    )


def shares_of(capacities: Sequence[float], parties: int, experts: int) -> list[int]:
    """Return how many experts of a layer each party takes by its capacity: largest remainder, at least one."""
    if len(capacities) != parties:
        raise ConfigurationError(
            f"capacities has {len(capacities)} numbers for {parties} parties; give one for each, in the order of their "
            "names."
        )
    exact = [capacity / sum(capacities) * experts for capacity in capacities]
    shares = [max(1, int(share)) for share in exact]
    while sum(shares) != experts:
        step = 1 if sum(shares) < experts else -1
        movable = [i for i in range(parties) if step > 0 or shares[i] > 1]
        chosen = max(movable, key=lambda i: (step * (exact[i] - shares[i]), -i))
        shares[chosen] += step
    return shares
