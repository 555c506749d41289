"""Run programs that a model wrote, in a child process with limits; off unless explicitly allowed.

Each program runs in an isolated interpreter of its own (`python -I`, no environment, no input) in an empty temporary
folder, with limits on processor time, memory, file size and open files set before it starts, and a wall clock that
ends the whole process group.  Where `unshare` (Linux) may make new namespaces, it has no network and sees no other
processes.  This is no barrier against a hostile program: it can read, and as its user write, what lies on the disk.
Run it in a container, or not at all.

Invariant: a program passes only if it ran to its end; leaving early, even with status 0, is a failure.
"""

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vflair_flower.errors import ConfigurationError

# Runs in the child.  The word that proves the end of the program was reached is read from standard input.
_LAUNCHER = """
import os, resource, sys
word = sys.stdin.readline().strip().encode()
seconds, memory = int(sys.argv[2]), int(sys.argv[3])
for limit, value in (("CPU", seconds), ("AS", memory), ("DATA", memory), ("FSIZE", 1 << 20), ("NOFILE", 32),
                     ("CORE", 0), ("STACK", min(memory, 1 << 26))):
    what = getattr(resource, "RLIMIT_" + limit)
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(what, (value, value))
    except (ValueError, OSError):
        if sys.platform != "darwin":  # macOS does not limit memory
            raise
report, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nothing, stream)
try:
    with open(sys.argv[1], encoding="utf-8") as file:
        program = file.read()
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    said = word
except BaseException as error:
    said = type(error).__name__.encode()
os.write(report, said)
os._exit(0)
"""
_NAMESPACES = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")


@dataclass(frozen=True, kw_only=True)
class SandboxSettings:
    """Whether and within which limits generated programs run.

    Parameters
    ----------
    allow_generated_code : bool
        Must be set to True by whoever is ready to run what a model wrote.
    timeout_s : float
        Wall clock per program; processor time is limited to the same, rounded up.
    memory_bytes : int
        Address space of a program.
    need_no_network : bool
        Refuse to run where the network cannot be taken away.

    Raises
    ------
    ConfigurationError
        A limit is out of range.
    """

    allow_generated_code: bool = False
    timeout_s: float = 3.0
    memory_bytes: int = 512 * 2**20
    need_no_network: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < 3600:
            raise ConfigurationError(f"timeout_s is {self.timeout_s}. Choose 0 < timeout_s < 3600.")
        if self.memory_bytes < 64 * 2**20:
            raise ConfigurationError(
                f"memory_bytes is {self.memory_bytes}, in which no interpreter starts. Choose at least {64 * 2**20}."
            )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether a program passed; if not, the name of what it raised, ``"timeout"`` or ``"ended early"``."""

    passed: bool
    reason: str


def run_program(program: str, settings: SandboxSettings) -> Outcome:
    """Run a Python program that raises unless all is right.

    Parameters
    ----------
    program : str
        Its source.
    settings : SandboxSettings
        Must allow it.

    Raises
    ------
    ConfigurationError
        Generated code is not allowed, or the platform lacks what the settings need.
    """
    if not settings.allow_generated_code:
        raise ConfigurationError(
            "allow_generated_code is False, and this would run a program that a model wrote. Set it to True in a "
            "container that may be lost, or leave out pass@k."
        )
    if os.name != "posix":
        raise ConfigurationError(
            f"The platform is {os.name!r}, which cannot limit a child process. Use Linux or macOS."
        )
    prefix = namespaces_command()
    if settings.need_no_network and not prefix:
        raise ConfigurationError(
            "need_no_network is True, but `unshare` is missing or may not make namespaces here. Start the whole job "
            "in a container without a network, and set need_no_network to False."
        )
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="vflair-program-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        arguments = [str(path), str(int(-(-settings.timeout_s // 1))), str(settings.memory_bytes)]
        child = subprocess.Popen(
            [*prefix, sys.executable, "-I", "-B", "-c", _LAUNCHER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            said = child.communicate(f"{word}\n".encode(), timeout=settings.timeout_s)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            return Outcome(False, "timeout")
        finally:
            _end(child)
    if said == word:
        return Outcome(True, "passed")
    return Outcome(False, said[:60] or "ended early")


@functools.cache
def namespaces_command() -> tuple[str, ...]:
    """Return what to put before a command to take its network away, or nothing where that is not possible."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, *_NAMESPACES)
    try:
        tried = subprocess.run([*command, sys.executable, "-I", "-c", ""], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if tried.returncode == 0 else ()


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End the child and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None and not stream.closed:
            stream.close()
