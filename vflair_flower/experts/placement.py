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
        Per layer, for each expert the index of its host.
    """

    hosts: tuple[str, ...]
    host_of: tuple[tuple[int, ...], ...]

    def experts_of(self, host: str) -> tuple[tuple[int, ...], ...]:
        """Return, per layer, the experts of a host, ascending."""
        index = self.hosts.index(host)
        return tuple(tuple(e for e, owner in enumerate(layer) if owner == index) for layer in self.host_of)


def place_experts(settings: ExpertSettings, hosts: Sequence[str], *, layers: int, experts: int) -> Placement:
    """Spread every layer's experts over the parties.

    ``"round-robin"`` deals them one after the other, beginning with another party in each layer, so that uneven shares
    even out.  ``"capacity"`` gives each party as many as its capacity says of the whole (largest remainder, at least
    one), in a row.  ``"table"`` is what the settings say.

    Parameters
    ----------
    settings : ExpertSettings
        Placement, capacities, table.
    hosts : sequence of str
        The parties; their order does not matter.
    layers, experts : int
        Layers with experts, and experts of each.

    Raises
    ------
    ConfigurationError
        If there are more parties than experts, or capacities or table do not fit them.
    """
    names = tuple(sorted(hosts))
    n = len(names)
    if not 1 <= n <= experts:
        raise ConfigurationError(
            f"{n} parties are to host the {experts} experts of each layer; every party hosts at least one. Take fewer "
            "parties."
        )
    if settings.placement == "round-robin":
        host_of = tuple(tuple((e + layer) % n for e in range(experts)) for layer in range(layers))
    elif settings.placement == "capacity":
        shares = _shares(settings.capacities, n, experts)
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
    return Placement(hosts=names, host_of=host_of)


def _shares(capacities: Sequence[float], parties: int, experts: int) -> list[int]:
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
