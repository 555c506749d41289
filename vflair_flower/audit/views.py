"""Which adversary has which kind of view."""

from vflair_flower.attacks import SplitView
from vflair_flower.errors import ConfigurationError

_SEES: dict[type, str] = {SplitView: "model-party"}
ADVERSARIES = tuple(dict.fromkeys(_SEES.values()))


def adversary_of(view: type) -> str:
    """Return who sees a kind of view; raise ConfigurationError where an audit cannot make one."""
    if view not in _SEES:
        raise ConfigurationError(
            f"an audit has no adversary that sees a {view.__name__}; there are "
            f"{', '.join(kind.__name__ for kind in _SEES)}. Attack another view, or call run_attack yourself."
        )
    return _SEES[view]
