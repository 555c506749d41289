"""A model party that serves on a thread of this process, for tests of what data parties do with it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vflair_flower.generation import Adapter, ModelServer, ServeSettings, Ticket
from vflair_flower.generation.serving import WRITING
from vflair_flower.partition import PartitionPlan
from vflair_flower.settings import GenerationSettings
from vflair_flower.spec import SplitSpec

BOUNDS = GenerationSettings(max_rows=4, max_length=40)


@contextmanager
def serving(
    model: str,
    *parties: str,
    adapter: Adapter | None = None,
    plan: PartitionPlan | None = None,
    bounds: GenerationSettings = BOUNDS,
    **settings: object,
) -> Iterator[Callable[[str], Ticket]]:
    """Serve on a thread; yields what returns a party's newest ticket."""
    handed: dict[str, list[Ticket]] = {party: [] for party in parties}
    spec = SplitSpec(model=model, plan=plan or PartitionPlan(), task=WRITING, tuning=None, generation=bounds)
    served = ModelServer(
        spec,
        ServeSettings(parties=parties, bind="inproc", **settings),
        adapter=adapter,
        hand_out=lambda ticket: handed[ticket.party].append(ticket),
    )
    with served:
        thread = threading.Thread(target=served.run, daemon=True)
        thread.start()
        try:
            yield lambda party: handed[party][-1]
        finally:
            served.stop()
            thread.join(20)
        assert not thread.is_alive()


def wait_until(ready: Callable[[], bool]) -> None:
    """Wait for what another thread brings about; fail after ten seconds."""
    limit = threading.Event()
    for _ in range(500):
        if ready():
            return
        limit.wait(0.02)
    raise AssertionError("it never came")
