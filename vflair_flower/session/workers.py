"""Workers: one thread for each calling party, on which handlers run.

What it is: order within a party, independence between parties.  What it is not: a pool; a handler that waits holds
nobody up but its own caller.  Invariant: jobs of one source run in order and one at a time, and after `close` none
starts.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

Job = Callable[[], None]


class Workers:
    """Run jobs, one thread per source; threads start when they are first needed.

    Parameters
    ----------
    name : str
        Start of the threads' names.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._jobs: dict[str, deque[Job]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._closed = False

    def submit(self, source: str, job: Job) -> None:
        """Run a job after all earlier ones of this source; dropped after `close`."""
        with self._changed:
            if self._closed:
                return
            self._jobs.setdefault(source, deque()).append(job)
            if source not in self._threads:
                thread = threading.Thread(
                    target=self._run, args=(source,), name=f"{self._name}-for-{source}", daemon=True
                )
                self._threads[source] = thread
                thread.start()
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Start no further job, and wait for those that run."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            threads = list(self._threads.values())
            self._changed.notify_all()
        end = time.monotonic() + timeout_s
        for thread in threads:
            if thread is threading.current_thread():
                continue
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                logger.warning(
                    "a handler on thread %s still runs %.0f s after its session ended; let it end when on_lost or "
                    "the session's end tells it to",
                    thread.name,
                    timeout_s,
                )

    def _run(self, source: str) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._jobs.get(source))
                if self._closed:
                    return
                job = self._jobs[source].popleft()
            try:
                job()
            except Exception:
                logger.exception("a job on thread %s failed", threading.current_thread().name)
            del job  # it holds tensors; the thread may wait long for the next one
