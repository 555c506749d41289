"""`make run`: run the main job with `flwr run`, in a Flower home of this project's own, and say how it ended.

`flwr run --stream` alone would start a daemon that stays and answers for other versions later, install the app's
dependencies anew for each run, and exit with 0 when the run failed.  Here a SuperLink of our own lives for exactly one
run, and the exit code is the run's.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from flwr.cli.config_utils import load_and_validate
from flwr.common.config import fuse_dicts, parse_config_args

from simulations.audit.settings import AuditSettings, check_audit
from simulations.bench.cell import check_matrix
from simulations.bench.settings import BenchSettings
from simulations.jobs import Settings, read_job
from simulations.moe.settings import MoeSettings, check_moe
from simulations.settings import new_run_id
from vflair_flower.errors import ConfigurationError

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".flwr"
CONNECTION = "vflair"
_START_S = 60.0
_ATTEMPTS = 2


def main(
    run_config: Annotated[
        list[str] | None,
        typer.Option(help="Settings that differ, such as \"data='folder' seed=1\", or a TOML file; repeatable."),
    ] = None,
) -> None:
    """Run the main job and exit with 0 only if it finished."""
    try:
        settings = read_settings(run_config or [])
        _check(settings)
    except (ConfigurationError, ValueError, typer.BadParameter) as error:
        _fail(str(error))
    run_id = settings.resume or settings.run_id or new_run_id()
    extra = {"run-id": "" if settings.resume else run_id, "base-dir": settings.base_dir or str(Path.cwd())}
    overrides = {**read_overrides(run_config or []), **extra}
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in overrides.items())
    run_dir = (Path(extra["base-dir"]) / settings.runs).resolve() / run_id
    for attempt in range(1, _ATTEMPTS + 1):
        status, code, log_file = _run_once(config, settings)
        if code == 0 and status == "finished:completed" and (run_dir / "result.json").is_file():
            return
        if attempt == _ATTEMPTS or status != "finished:failed" or _has_begun(run_dir):
            _fail(_cause(run_dir, status, code), log_file)
        typer.secho("\nFlower's simulation failed before the first round; starting it once more.", err=True)


def _run_once(config: str, settings: Settings) -> tuple[str, int, Path]:
    """Return how Flower says that the run ended, the exit code of `flwr run`, and the SuperLink's log."""
    with _superlink() as (environment, log_file):
        command = [_tool("flwr"), "run", str(ROOT), CONNECTION, "--stream"]
        command += ["--run-config", config]
        command += ["--federation-config", _federation(settings)]
        code = subprocess.run(command, env=environment, check=False).returncode
        status = _final_status(environment) if code == 0 else "not started"
    return status, code, log_file


def _has_begun(run_dir: Path) -> bool:
    """Whether the job itself has said or kept anything; else only the engine failed, as Ray does now and then."""
    return (run_dir / "error.json").exists() or (run_dir / "checkpoints").exists()


def read_settings(run_config: list[str]) -> Settings:
    """Read the settings as Flower will, so that what is wrong is said before anything starts."""
    defaults = read_defaults()
    overrides = read_overrides(run_config)
    unknown = sorted(set(overrides) - set(defaults))
    if unknown:
        raise ConfigurationError(
            f"there is no setting {', '.join(map(repr, unknown))}; there are {', '.join(sorted(defaults))}."
        )
    settings = read_job(fuse_dicts(defaults, overrides))
    if isinstance(settings, MoeSettings):
        read = {"job", *(field.name.replace("_", "-") for field in fields(settings))}
        unread = sorted(set(overrides) - read)
        if unread:
            raise ConfigurationError(
                f"the job 'moe' does not read {', '.join(map(repr, unread))}, and would run as if nothing had been "
                "said. Leave that out; a job of your own takes it from its SplitSpec (docs/experts.md)."
            )
    return settings


def read_defaults() -> dict[str, Any]:
    """Return the run configuration as it stands in pyproject.toml."""
    loaded = load_and_validate(ROOT / "pyproject.toml", check_module=False)
    project: dict[str, Any] = loaded[0] if isinstance(loaded, tuple) else loaded
    defaults: dict[str, Any] = project["tool"]["flwr"]["app"]["config"]
    return defaults


def _check(settings: Settings) -> None:
    """Find what is wrong with the settings before a daemon is started for them."""
    if isinstance(settings, MoeSettings):
        check_moe(settings)
        return
    if isinstance(settings, AuditSettings):
        check_audit(settings)
        return
    if isinstance(settings, BenchSettings):
        check_matrix(settings.matrix, {**read_defaults(), "base-dir": str(settings.base)})
        return
    from simulations.rows import load_dataset, task_of
    from vflair_flower.certificate import admit
    from vflair_flower.partition import resolve_model
    from vflair_flower.partition.footprint import footprint
    from vflair_flower.partition.sources import read_config
    from vflair_flower.training import metric_of

    task = task_of(load_dataset(settings))
    metric_of(task.kind)
    source = resolve_model(settings.model, settings.base)
    admit(read_config(source))
    footprint(source, settings.spec(task))


def read_overrides(run_config: list[str]) -> dict[str, Any]:
    """Return what text and TOML files set, the later over the earlier; `flwr run` takes either text or one file."""
    found: dict[str, Any] = {}
    for one in run_config:
        found |= parse_config_args([one])
    return found


@contextmanager
def _superlink() -> Iterator[tuple[dict[str, str], Path]]:
    """Run a SuperLink for this run alone; yields the environment that leads to it, and its log file."""
    HOME.mkdir(exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="run-", dir=HOME))
    port = _free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\nfederation = "@none/default"\n'
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_niceness": "0",  # parties are no background work: the body waits for them
        "OMP_WAIT_POLICY": "PASSIVE",  # more threads than cores: those that spin while they wait take others' time
        "MALLOC_ARENA_MAX": "2",  # one arena per thread of the hub would keep a gigabyte that nobody uses
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    }
    log_file = home / "superlink.log"
    command = [_tool("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--database", str(home / "state.db")]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_up(process, port, log_file)
        yield environment, log_file
    finally:
        _stop(process)
        kept = HOME / "superlink.log"
        shutil.copyfile(log_file, kept)
        shutil.rmtree(home, ignore_errors=True)


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log_file: Path) -> None:
    limit = time.monotonic() + _START_S
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise RuntimeError(f"Flower's SuperLink ended with code {process.returncode}; see {log_file}.")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"Flower's SuperLink did not answer within {_START_S:g} s; see {log_file}.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the SuperLink and all that it started."""
    import psutil

    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(family, timeout=10)
    for member in alive:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def _final_status(environment: dict[str, str]) -> str:
    """Return how the run ended; `flwr run --stream` may lose its stream on a busy machine while the run goes on."""
    unknown_since = None
    while True:
        status = _status(environment)
        if status.startswith("finished"):
            return status
        if status not in ("unknown", "not started"):
            unknown_since = None
        elif unknown_since is None:
            unknown_since = time.monotonic()
        elif time.monotonic() - unknown_since > _START_S:
            return status
        time.sleep(1.0)


def _status(environment: dict[str, str]) -> str:
    """Return how Flower says that the run ended: ``finished:completed`` or something else."""
    listed = subprocess.run(
        [_tool("flwr"), "list", CONNECTION, "--format", "json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        runs = json.loads(listed.stdout)["runs"]
        return str(runs[0]["status"]) if runs else "not started"
    except (ValueError, KeyError, IndexError):
        return "unknown"


def _federation(settings: Settings) -> str:
    nodes = settings.num_nodes
    gpus = 0.0
    if isinstance(settings, AuditSettings):
        gpus = settings.audit_gpus_per_cell
    elif isinstance(settings, BenchSettings):
        gpus = settings.bench_gpus_per_cell
    return (
        f"num-supernodes={nodes} client-resources-num-cpus=1 client-resources-num-gpus={gpus} "
        f"init-args-num-cpus={nodes}"
    )


def _cause(run_dir: Path, status: str, code: int) -> str:
    error_file = run_dir / "error.json"
    if error_file.is_file():
        error = json.loads(error_file.read_text())
        return f"{error['type']}: {error['message']}"
    return f"Flower says that the run is {status!r} (flwr exited with {code}) and it left no result in {run_dir}."


def _tool(name: str) -> str:
    """Return the path of a program of this very environment."""
    own = Path(sys.executable).parent / name
    return str(own) if own.exists() else shlex.quote(name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fail(cause: str, log_file: Path | None = None) -> None:
    typer.secho(f"\nThe run failed: {cause}", err=True, fg=typer.colors.RED)
    if log_file is not None:
        typer.secho(f"Flower's own log: {HOME / 'superlink.log'}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
