"""A data party is killed with SIGKILL in the middle of a step: the job goes on, or ends with an error that names it."""

import dataclasses
import time

import pytest
import torch

from simulations.local_grid import ProcessGrid
from tests.jobs import fedavg, job_nodes, job_spec
from vflair_flower.errors import PartyLostError
from vflair_flower.settings import LoraSettings, TrainingSettings
from vflair_flower.strategies import SplitLearning

pytestmark = pytest.mark.timeout(240)
DEADLINE_S = 60.0


@pytest.fixture
def spec(tiny_bert):
    training = TrainingSettings(rounds=3, local_steps=6, batch_size=4, max_tokens=16)
    return job_spec(tiny_bert, tuning=LoraSettings(), training=training)


def nodes(tmp_path, **dying):
    first, second, third = job_nodes(tmp_path, 3)
    return [first, {**second, **dying}, third]


def strategy_for(spec, tmp_path, **settings):
    return SplitLearning(
        spec=spec, aggregator=fedavg(), job="job", checkpoint_dir=tmp_path / "run", deadline_s=DEADLINE_S, **settings
    )


@pytest.mark.parametrize(
    "body_mode",
    [
        "synchronous",
        pytest.param("sequential", marks=pytest.mark.slow),
        pytest.param("replicated", marks=pytest.mark.slow),
    ],
)
def test_the_others_go_on(spec, tmp_path, body_mode):
    spec = dataclasses.replace(spec, training=dataclasses.replace(spec.training, rounds=2))
    grid = ProcessGrid("tests.tiny_app", nodes(tmp_path, **{"die-in-round": 1}))
    try:
        with strategy_for(spec, tmp_path, body_mode=body_mode, join_deadline_s=12) as strategy:
            strategy.start(grid)
    finally:
        grid.close()
    first, second = strategy.history
    assert set(first.lost) == {"party-1"}
    assert first.seconds["train"] < DEADLINE_S
    assert set(second.lost) == {"party-1"}, "its process is gone for good"
    assert [record.steps for record in strategy.history] == [6, 6]


def test_the_job_stops_within_the_deadline_and_resumes_where_it_was(spec, tmp_path):
    grid = ProcessGrid("tests.tiny_app", nodes(tmp_path / "whole"))
    try:
        with strategy_for(spec, tmp_path / "whole") as whole:
            whole.start(grid)
    finally:
        grid.close()

    grid = ProcessGrid("tests.tiny_app", nodes(tmp_path, **{"die-in-round": 3}))
    try:
        with strategy_for(spec, tmp_path, on_party_lost="stop") as broken:
            started = time.monotonic()
            with pytest.raises(PartyLostError, match="party 'party-1' is lost"):
                broken.start(grid)
            assert time.monotonic() - started < DEADLINE_S
    finally:
        grid.close()
    assert len(broken.history) == 3

    grid = ProcessGrid("tests.tiny_app", nodes(tmp_path))
    try:
        with strategy_for(spec, tmp_path, resume=True) as resumed:
            resumed.start(grid)
    finally:
        grid.close()
    assert [r.train_metrics for r in resumed.history] == [r.train_metrics for r in whole.history]
    assert [r.evaluate_metrics for r in resumed.history] == [r.evaluate_metrics for r in whole.history]
    states = [{**s.arrays.to_torch_state_dict(), **s.body_state()} for s in (whole, resumed)]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
