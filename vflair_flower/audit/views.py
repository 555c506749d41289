"""Which adversary has which kind of view, and what of a model an audit of it is cut by."""

from vflair_flower.attacks import SplitView
from vflair_flower.attacks.experts.view import HostView
from vflair_flower.attacks.gradients.view import GradientView
from vflair_flower.attacks.membership.view import ModelView

MODEL_PARTY = "model-party"
AGGREGATOR = "aggregator"
"""The aggregating server: it sees gradients of what parties train."""
OWNER = "model-owner"
"""Whoever has the finished model."""
HOSTS = "hosts"
"""Hosts of experts; a cell names which: ``"hosts:party-1+party-2"``."""
_SEES: dict[type, str] = {SplitView: MODEL_PARTY, GradientView: AGGREGATOR, ModelView: OWNER, HostView: HOSTS}


def adversary_of(view: type) -> str | None:
    """Return who sees a kind of view; None where an audit makes none."""
    return _SEES.get(view)
