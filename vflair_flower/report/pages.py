"""What renders every page: jinja2, which escapes all foreign text, and numbers as people read them."""

from jinja2 import Environment, StrictUndefined

from vflair_flower.report import numbers

_FILTERS = ("count", "counted", "large", "size", "percent", "points", "interval", "duration", "setting")


def page_environment() -> Environment:
    """Return the environment that pages' templates are rendered in."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for name in _FILTERS:
        environment.filters[name] = getattr(numbers, name)
    environment.globals["share"] = numbers.share
    return environment
