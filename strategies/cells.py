"""Cells of a grid as Flower messages: each goes to a node that is free, and what a node answers comes back at once.

A simulation's nodes share a box's GPUs by fractions (``client-resources-num-gpus``), so as many cells run at once as
the box has room for.  Invariant: a cell that fails is reported and the others go on.
"""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from vflair_flower.errors import ConfigurationError
from vflair_flower.strategies.grid import reason_of

CellT = TypeVar("CellT")
_POLL_S = 0.2


def run_cells(
    grid: Grid,
    cells: Iterable[CellT],
    *,
    action: str,
    ask: Callable[[CellT], dict[str, str]],
    at_once: int,
    on_done: Callable[[CellT, RecordDict], None],
    on_failed: Callable[[CellT, str], None],
) -> None:
    """Have nodes work on cells until all are done or have failed.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        Flower's.
    cells : iterable
        What is to be done.
    action : str
        Messages are of type ``query.<action>``.
    ask : callable
        Returns what a message says of a cell.
    at_once : int
        How many nodes work at once, at most.
    on_done, on_failed : callable
        Take what a node answered, or why it did not.

    Raises
    ------
    ConfigurationError
        There is no node.
    """
    waiting = list(cells)
    nodes = sorted(grid.get_node_ids())[:at_once]
    if waiting and not nodes:
        raise ConfigurationError("there is no Flower node to work on cells. Start the job with one node or more.")
    running: dict[str, tuple[CellT, int]] = {}
    while waiting or running:
        while waiting and nodes:
            cell, node = waiting.pop(0), nodes.pop(0)
            content = RecordDict({"config": ConfigRecord(dict(ask(cell)))})
            message = Message(content, dst_node_id=node, message_type=f"query.{action}")
            running[next(iter(grid.push_messages([message])))] = (cell, node)
        time.sleep(_POLL_S)
        for reply in grid.pull_messages(list(running)):
            cell, node = running.pop(reply.metadata.reply_to_message_id)
            nodes.append(node)
            if reply.has_error():
                on_failed(cell, reason_of(reply))
            else:
                on_done(cell, reply.content)
