"""Which job a run configuration is of: its key ``job`` says it."""

from collections.abc import Mapping
from typing import Any

from simulations.moe.settings import MoeSettings
from simulations.settings import JobSettings
from vflair_flower.settings import one_of


def read_job(config: Mapping[str, Any]) -> JobSettings | MoeSettings:
    """Return the settings of the job; raise ConfigurationError for an unknown job or a wrong setting."""
    job = str(config.get("job", ""))
    one_of("job", job, ("split", "moe"))
    return (MoeSettings if job == "moe" else JobSettings).from_run_config(config)
