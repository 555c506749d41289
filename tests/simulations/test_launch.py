"""`make run`: bad input is said before a daemon starts; a real `flwr run` with real processes ends as it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vflair_flower.report import Result

ROOT = Path(__file__).resolve().parents[2]


def launch(*run_config, cwd=ROOT, home=None, variables=None, timeout=280):
    command = [sys.executable, "-m", "simulations.launch"]
    command += [part for config in run_config for part in ("--run-config", config)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        **({"HOME": str(home)} if home else {}),
        **(variables or {}),
    }
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.parametrize(
    ("run_config", "message"),
    [
        ("head-blocks=9", "head_blocks is 9"),
        ("rondos=3", "there is no setting 'rondos'"),
        ("data='nowhere'", "nowhere"),
        ("rounds='many'", "rounds is 'many'; it takes a value of type int"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(run_config, message, tmp_path):
    done = launch(run_config, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "SuperLink" not in done.stdout


def test_flwr_run_with_processes_of_its_own(tmp_path, tiny_bert, easy_rows):
    """The whole way: SuperLink, Ray, a process per party, gRPC sessions; and nothing in the user's own Flower home."""
    home = tmp_path / "home"
    home.mkdir()
    small = f"model='{tiny_bert}' data='rows' parties=2 rounds=2 local-steps=3 run-id='smoke'"
    done = launch(small, cwd=tmp_path, home=home)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = Result.read(tmp_path / "runs" / "smoke" / "result.json")
    assert [r.steps for r in result.rounds] == [3, 3]
    assert "round 2/2" in done.stdout
    assert str(tmp_path / "runs" / "smoke" / "report.html") in done.stdout
    assert not (home / ".flwr").exists()


def test_failed_run_exits_with_its_cause(tmp_path, tiny_bert, easy_rows):
    """The run fails at the parties, after the launcher's own checks: `flwr run --stream` alone would exit with 0."""
    small = f"model='{tiny_bert}' data='rows' parties=2 rounds=1 local-steps=1 run-id='bad' hub-bind='nowhere:x'"
    done = launch(small, cwd=tmp_path)
    assert done.returncode == 1
    assert "The run failed: ConfigurationError" in done.stderr
    assert json.loads((tmp_path / "runs" / "bad" / "error.json").read_text())["type"] == "ConfigurationError"


@pytest.mark.slow
def test_an_engine_that_fails_before_the_first_round_is_started_once_more(tmp_path, tiny_bert, easy_rows):
    """Ray fails to come up now and then, and nothing is lost by a second try; that it always fails is said."""
    small = f"model='{tiny_bert}' data='rows' parties=2 rounds=1 local-steps=1 run-id='engine'"
    done = launch(small, cwd=tmp_path, variables={"RAY_TMPDIR": "/proc/nowhere"})
    assert done.returncode == 1
    assert done.stderr.count("starting it once more") == 1
    assert "The run failed: Flower says that the run is 'finished:failed'" in done.stderr
