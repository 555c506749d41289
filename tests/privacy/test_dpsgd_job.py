"""Whole jobs with DP-SGD on an in-process grid: every party's epsilon, all body modes, resuming, policies."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

from simulations.local_grid import LocalGrid
from tests.jobs import fedavg, job_nodes, job_spec
from tests.tiny import tiny_rows
from tests.tiny_app import rows, state_dir
from vflair_flower.clients import DataParty, ModelParty, role_of, split_session
from vflair_flower.clients.mods import beside_session
from vflair_flower.control import HELLO, MODEL_PARTY_ROLE, SERVE
from vflair_flower.dp_settings import DpSettings
from vflair_flower.errors import SessionError
from vflair_flower.privacy import MayLeave, Policy, Secret
from vflair_flower.privacy.dpsgd import epsilon_of
from vflair_flower.settings import TrainingSettings
from vflair_flower.strategies import HubSettings, SplitLearning
from vflair_flower.tasks import collate, encode_task
from vflair_flower.training.row_losses import losses_per_row

POLICY = Policy(
    [
        MayLeave(tensor=("hidden", "grad", "attention_mask", "position_ids")),
        MayLeave(tensor="gradient", covered_by=("dp-sgd",)),
        MayLeave(tensor="adapters", to="server", covered_by=("dp-sgd",)),
    ]
)


def make_app(policy=None, mods=()):
    app = ClientApp()
    data_party = DataParty(rows, state_dir=state_dir, policy=policy)
    model_party = ModelParty(state_dir=state_dir)

    def hello(message, context):
        return (model_party if role_of(context) == MODEL_PARTY_ROLE else data_party).hello(message, context)

    app.query(HELLO)(hello)
    app.train(mods=[beside_session(mod) for mod in mods])(data_party.train)
    app.train(SERVE)(model_party.serve)
    app.evaluate()(data_party.evaluate)
    return app


@pytest.fixture
def nodes(tmp_path):
    return job_nodes(tmp_path, 2)


@pytest.fixture
def spec(tiny_bert):
    training = TrainingSettings(rounds=2, local_steps=2, batch_size=4, evaluation_batch_size=4, max_tokens=16)
    return job_spec(tiny_bert, training=training, privacy=DpSettings(noise_multiplier=0.8, delta=1e-2))


def run(nodes, spec, *, policy=None, aggregator=None, mods=(), **settings):
    settings = {"hub": HubSettings(bind="inproc"), "deadline_s": 20.0, **settings}
    grid = LocalGrid(make_app(policy, mods), nodes)
    with SplitLearning(spec=spec, aggregator=aggregator or fedavg(), **settings) as strategy:
        strategy.start(grid)
    return strategy


@pytest.mark.parametrize(
    ("body_mode", "averaging"),
    [("synchronous", "step"), ("sequential", "round"), ("replicated", "round")],
)
def test_every_party_reports_what_its_rows_have_cost(nodes, spec, body_mode, averaging):
    strategy = run(nodes, dataclasses.replace(spec, averaging=averaging), policy=POLICY, body_mode=body_mode)
    assert len(strategy.reports) == 3
    expected = epsilon_of([(0.8, 4 / 24, 4)], 1e-2, "prv")
    for report in strategy.reports.values():
        assert report.privacy["steps"] == 4
        assert report.privacy["delta"] == 1e-2
        if report.role == "data party":
            assert report.privacy["epsilon"] == pytest.approx(expected)
        else:  # its segment alone tells less than both together
            assert 0 < report.privacy["epsilon"] < expected
        assert report.privacy["epsilon_rdp"] >= report.privacy["epsilon"]
    assert [record.train_metrics for record in strategy.history] == [{}, {}]
    assert all(torch.isfinite(tensor).all() for tensor in strategy.arrays.to_torch_state_dict().values())


@pytest.mark.parametrize("change", [{"privacy": None}, {"defence_seed": 5}], ids=["no-dp", "known-noise"])
def test_a_policy_lets_adapters_leave_only_if_their_noise_is_secret(nodes, spec, change):
    with pytest.raises(SessionError, match=r"'adapters'.*not covered by dp-sgd"):
        run(nodes, dataclasses.replace(spec, **change), policy=POLICY, on_party_lost="stop")


def test_the_documented_loop_works(nodes, spec, tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "dp-sgd.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {
        "torch": torch,
        "Secret": Secret,
        "split_session": split_session,
        "encode_task": encode_task,
        "collate": collate,
        "losses_per_row": losses_per_row,
        "state": tmp_path / "own",
        "my_rows": tiny_rows(0).train,
    }
    exec(compile(code, "dp-sgd.md", "exec"), names)
    own = ClientApp()
    own.train()(names["train"])
    own.query(HELLO)(DataParty(rows, state_dir=state_dir).hello)
    own.evaluate()(DataParty(rows, state_dir=state_dir).evaluate)
    spec = dataclasses.replace(
        spec, training=TrainingSettings(rounds=1, local_steps=3, batch_size=4, evaluation_batch_size=4, max_tokens=16)
    )
    with SplitLearning(
        spec=spec, aggregator=fedavg(), hub=HubSettings(bind="inproc"), deadline_s=20.0, on_party_lost="stop"
    ) as strategy:
        strategy.start(LocalGrid(own, nodes[:1]))
    assert strategy.reports["party-0"].privacy["steps"] == 3
    assert json.loads((tmp_path / "own" / "dp-sgd.json").read_text())["history"] == [[0.8, 4 / 24, 3]]


def test_a_job_whose_noise_is_repeatable_repeats_itself(nodes, spec):
    spec = dataclasses.replace(
        spec, defence_seed=5, training=TrainingSettings(rounds=1, local_steps=2, batch_size=4, max_tokens=16)
    )
    one, other = (run(nodes, spec, job=name).arrays.to_torch_state_dict() for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resuming_goes_on_with_the_account(nodes, spec, tmp_path):
    folder = tmp_path / "checkpoints"
    grid = LocalGrid(make_app(), nodes)
    settings = {"hub": HubSettings(bind="inproc"), "deadline_s": 20.0, "checkpoint_dir": folder, "job": "resumed"}
    with SplitLearning(spec=spec, aggregator=fedavg(), **settings) as strategy:
        strategy.start(grid, num_rounds=1)
    account = tmp_path / "state" / "resumed" / "party-0" / "dp-sgd.json"
    assert json.loads(account.read_text())["history"] == [[0.8, 4 / 24, 2]]
    state = tmp_path / "state"
    shutil.copytree(state, tmp_path / "before")
    with SplitLearning(spec=spec, aggregator=fedavg(), resume=True, **settings) as strategy:
        strategy.start(LocalGrid(make_app(), nodes), num_rounds=2)
    assert strategy.reports["party-0"].privacy["steps"] == 4
    assert strategy.reports["model-party"].privacy["steps"] == 4
    # The same again, but one party has lost its account.
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "before", state)
    account.unlink()
    for leftover in folder.glob("*2*"):
        leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
    with (
        SplitLearning(spec=spec, aggregator=fedavg(), resume=True, on_party_lost="stop", **settings) as strategy,
        pytest.raises(SessionError, match=r"party-0"),
    ):
        strategy.start(LocalGrid(make_app(), nodes), num_rounds=2)
    assert not account.exists()


def test_the_model_party_may_be_a_node(nodes, spec, tmp_path):
    model_node = {"role": "model party", "state-dir": str(tmp_path / "state")}
    strategy = run([*nodes, model_node], spec, model_party="node")
    (report,) = [one for one in strategy.reports.values() if one.role == MODEL_PARTY_ROLE]
    assert report.privacy["steps"] == 4


@pytest.mark.parametrize("wrapper", ["server side", "client side", "local"])
def test_flowers_own_differential_privacy_composes(nodes, spec, wrapper):
    """Its clipping leaves no party's change of a round above the bound; with a bound of almost 0, nothing moves."""
    bound = {"noise_multiplier": 1e-6, "clipping_norm": 1e-7, "num_sampled_clients": 2}
    mods, aggregator = (), fedavg()
    if wrapper == "server side":
        aggregator = DifferentialPrivacyServerSideFixedClipping(aggregator, **bound)
    elif wrapper == "client side":
        aggregator, mods = DifferentialPrivacyClientSideFixedClipping(aggregator, **bound), (fixedclipping_mod,)
    else:
        mods = (LocalDpMod(clipping_norm=1e-7, sensitivity=1e-9, epsilon=1.0, delta=1e-3),)
    spec = dataclasses.replace(
        spec, training=TrainingSettings(rounds=1, local_steps=2, batch_size=4, max_tokens=16), averaging="round"
    )
    plain = run(nodes, spec, job="plain")
    strategy = run(nodes, spec, aggregator=aggregator, mods=mods, job=wrapper.replace(" ", "-"))
    assert strategy.reports["party-0"].privacy["steps"] == 2
    moved, unmoved = (_largest(one) for one in (plain, strategy))
    assert unmoved < 1e-5 < moved


def _largest(strategy):
    """The largest lora_B after training; it begins at 0."""
    found = [v for n, v in strategy.arrays.to_torch_state_dict().items() if "lora_B" in n]
    return max(float(one.abs().max()) for one in found)
