"""The project's own Flower app, for commands that run its jobs: a clone has it, the package alone does not."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from vflair_flower.errors import ConfigurationError


def project_root() -> Path:
    """Return the folder of the project; raise ConfigurationError where the package stands without it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "simulations" / "launch.py").is_file():
        raise ConfigurationError(
            f"{root} has no simulations/launch.py: this command runs jobs of the project's own Flower app, which the "
            "package alone does not hold. Run it from a clone of the project, set up by `make setup`."
        )
    return root


def run_job(keys: Mapping[str, object]) -> int:
    """Run a job with these keys of the run configuration, relative to the working directory; return its exit status."""
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in {"base-dir": str(Path.cwd()), **keys}.items())
    command = [sys.executable, "-m", "simulations.launch", "--run-config", config]
    return subprocess.run(command, cwd=project_root(), check=False).returncode
