"""The main job on a grid of this process, for jobs that run it many times: without Ray, SuperLink and its own lines."""

import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, RecordDict

from simulations.local_grid import LocalGrid
from simulations.settings import JobSettings


def run_main_job(config: Mapping[str, Any]) -> None:
    """Run the main job; its results are where the configuration's ``runs`` and ``run-id`` say.

    Parameters
    ----------
    config : mapping
        All keys of the run configuration.
    """
    server = importlib.import_module("simulations.server_app")  # which knows the jobs that call this
    client = importlib.import_module("simulations.client_app")
    count = JobSettings.from_run_config(config).num_nodes
    nodes = [{"partition-id": index, "num-partitions": count} for index in range(count)]
    grid = LocalGrid(client.app, nodes, config)
    try:
        with quiet_flower():
            server.app(grid, Context(1, 1, {}, RecordDict(), dict(config)))
    finally:
        grid.close()


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep strategies from writing their progress, which is not that of the job."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
