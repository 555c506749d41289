"""A model party as a child process on loopback, so that one command shows both sides of a cut."""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vflair_flower.errors import SessionError
from vflair_flower.generation.tickets import Ticket

_START_S = 600.0
_END_S = 10.0
_LAST_CHARS = 400


@contextmanager
def model_party_beside(arguments: Sequence[str]) -> Iterator[Ticket]:
    """Start ``vflair serve --once`` with these arguments, and yield the ticket that it prints.

    It ends with its session, at the latest with this block.

    Raises
    ------
    SessionError
        If it ends before it serves, with its own words.
    """
    command = [sys.executable, "-m", "vflair_flower.cli", "serve", "--once", *arguments]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            lines: list[str] = []
            assert process.stdout is not None
            reader = threading.Thread(target=lambda out=process.stdout: lines.append(out.readline()), daemon=True)
            reader.start()
            reader.join(_START_S)
            if not lines or not lines[0].strip():
                process.kill()
                process.wait()
                said.seek(0)
                words = " ".join(said.read().split())[-_LAST_CHARS:]
                raise SessionError(f"the model party beside this one did not start: {words or 'it said nothing'}")
            yield Ticket.from_json(lines[0])
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
