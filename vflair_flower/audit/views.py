"""Which adversary has which kind of view, and what of a model an audit of it is cut by."""

from vflair_flower.attacks import SplitView
from vflair_flower.attacks.gradients.view import GradientView
from vflair_flower.attacks.membership.view import ModelView
from vflair_flower.errors import ConfigurationError

MODEL_PARTY = "model-party"
AGGREGATOR = "aggregator"
"""The aggregating server: it sees gradients of what parties train."""
OWNER = "model-owner"
"""Whoever has the finished model."""
_SEES: dict[type, str] = {SplitView: MODEL_PARTY, GradientView: AGGREGATOR, ModelView: OWNER}
ADVERSARIES = tuple(dict.fromkeys(_SEES.values()))


def adversary_of(view: type) -> str:
    """Return who sees a kind of view; raise ConfigurationError where an audit cannot make one."""
    if view not in _SEES:
        raise ConfigurationError(
            f"an audit has no adversary that sees a {view.__name__}; there are "
            f"{', '.join(kind.__name__ for kind in _SEES)}. Attack another view, or call run_attack yourself."
        )
    return _SEES[view]
