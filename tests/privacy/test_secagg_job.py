"""Whole jobs with secure aggregation on an in-process grid: equal to plain ones, and no party's arrays are seen."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedMedian,
)

from simulations.local_grid import LocalGrid
from tests.jobs import fedavg, job_nodes, job_spec, state_of
from tests.tiny_app import rows, state_dir
from vflair_flower.clients import DataParty, secure, split_session
from vflair_flower.clients.mods import beside_session
from vflair_flower.clients.secure import answer_stage, masked
from vflair_flower.control import SECAGG
from vflair_flower.dp_settings import DpSettings
from vflair_flower.errors import ConfigurationError, PartyLostError, SessionError
from vflair_flower.privacy import MayLeave, Policy, masked_party, masked_sum
from vflair_flower.secagg_settings import SecAggSettings
from vflair_flower.settings import ExpertSettings, TrainingSettings
from vflair_flower.strategies import HubSettings, SplitLearning

REST = MayLeave(tensor=("hidden", "grad", "attention_mask", "position_ids"))
POLICY = Policy([REST, MayLeave(tensor="adapters", to="server", covered_by=("secagg",))])


def make_app(policy=None, mods=(masked,)):
    app = ClientApp()
    party = DataParty(rows, state_dir=state_dir, policy=policy)
    party.register(app, train=False)
    app.train(mods=list(mods))(party.train)
    return app


@pytest.fixture
def nodes(tmp_path):
    return job_nodes(tmp_path, 3)


@pytest.fixture
def spec(tiny_bert):
    training = TrainingSettings(rounds=2, local_steps=2, batch_size=4, evaluation_batch_size=16, max_tokens=16)
    return job_spec(tiny_bert, training=training, secure_aggregation=SecAggSettings())


def run(nodes, spec, *, app=None, aggregator=None, rounds=None, **settings):
    settings = {"hub": HubSettings(bind="inproc"), "deadline_s": 20.0, **settings}
    with SplitLearning(spec=spec, aggregator=aggregator or fedavg(), **settings) as strategy:
        strategy.start(LocalGrid(app or make_app(), nodes), num_rounds=rounds)
    return strategy


def farthest(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def plain(spec):
    return dataclasses.replace(spec, secure_aggregation=None)


def in_turn(spec):
    """One round in which no step of a party depends on how many others there are."""
    return dataclasses.replace(
        spec, training=TrainingSettings(rounds=1, local_steps=2, batch_size=4, evaluation_batch_size=16, max_tokens=16)
    )


class Wiretap:
    """Every array and number that the strategy gets in a reply to a train message."""

    def __init__(self, monkeypatch):
        self.records = []
        original = SplitLearning._on_reply

        def on_reply(strategy, reply):
            if reply.metadata.message_type == "train" and reply.has_content():
                self.records.append(RecordDict(dict(reply.content.items())))
            original(strategy, reply)

        monkeypatch.setattr(SplitLearning, "_on_reply", on_reply)

    def sees_single_arrays(self, names):
        """Whether a reply has one of the arrays, a weight or a loss, or numbers that are not a uniform draw."""
        for content in self.records:
            found = list(content.array_records.values())
            if any(names & record.keys() for record in found) or content.metric_records:
                return True
            for array in (array.numpy() for record in found for array in record.values()):
                bits = np.unpackbits(array.view(np.uint8).reshape(array.size, 8), axis=1)
                if np.any(np.abs(bits.mean(axis=0) - 0.5) > 6 * 0.5 / array.size**0.5):
                    return True
        return False


def test_a_job_equals_the_plain_one_also_when_it_is_resumed(nodes, spec, tmp_path, monkeypatch):
    tap = Wiretap(monkeypatch)
    folder = tmp_path / "checkpoints"
    run(nodes, spec, rounds=1, job="summed", checkpoint_dir=folder)
    summed = run(nodes, spec, job="summed", checkpoint_dir=folder, resume=True)
    names = set(summed.arrays.keys())
    assert len(tap.records) == 6
    assert not tap.sees_single_arrays(names)
    tap.records.clear()
    other = run(nodes, plain(spec), job="plain")
    assert tap.sees_single_arrays(names)
    assert farthest(state_of(summed), state_of(other)) < 1e-6
    assert max(float(v.abs().max()) for n, v in state_of(summed).items() if "lora_B" in n) > 5e-3
    for one, two in zip(summed.history, other.history, strict=True):
        assert one.train_metrics == pytest.approx(two.train_metrics, abs=1e-5)
        assert one.lost == {}
    assert summed.control_bytes > 0


@pytest.mark.parametrize("broken", ["masks", "mod"])
def test_the_wiretap_sees_what_leaks(nodes, spec, monkeypatch, broken):
    """With masks of zeros, or a mod that lets the reply through, the check above must fail."""
    tap = Wiretap(monkeypatch)
    if broken == "masks":
        for module in (masked_party, masked_sum):
            monkeypatch.setattr(module, "mask_of", lambda key, size: np.zeros(size, np.uint64))
        strategy = run(nodes, in_turn(spec))
        assert tap.sees_single_arrays(set(strategy.arrays.keys()))
        return

    def leaky(message, context, call_next):
        with secure._around():
            return call_next(message, context)

    with pytest.raises(ConfigurationError, match="the reply of 'party-0' is not masked"):
        run(nodes, in_turn(spec), app=make_app(mods=[leaky]))
    assert tap.sees_single_arrays({"any"})


def test_a_party_that_dies_in_training_leaves_a_right_sum(nodes, spec, monkeypatch):
    _fail(monkeypatch, "party-1")
    spec = in_turn(spec)
    summed = run(nodes, spec, job="summed", body_mode="replicated")
    other = run(nodes, plain(spec), job="plain", body_mode="replicated")
    assert "disk on fire" in summed.history[0].lost["party-1"]
    assert farthest(state_of(summed), state_of(other)) < 1e-6
    assert summed.history[0].train_metrics == pytest.approx(other.history[0].train_metrics, abs=1e-5)


def test_a_party_without_keys_is_not_invited(nodes, spec, monkeypatch):
    original = masked_party.MaskedParty.keys

    def keys(self):
        if self.party == "party-2":
            raise OSError("no randomness")
        return original(self)

    monkeypatch.setattr(masked_party.MaskedParty, "keys", keys)
    strategy = run(nodes, in_turn(spec))
    assert list(strategy.history[0].lost) == ["party-2"]
    assert "no randomness" in strategy.history[0].lost["party-2"]
    assert {e.party for e in strategy.ledger.entries() if e.operation == "step"} == {"party-0", "party-1"}
    with pytest.raises(PartyLostError, match=r"'party-2' is lost: .*no randomness"):
        run(nodes, in_turn(spec), on_party_lost="stop", job="stop")


def test_too_few_parties_unmask_nothing_and_the_error_says_what_to_do(nodes, spec, monkeypatch):
    _fail(monkeypatch, "party-1", "party-2")
    with pytest.raises(
        SessionError,
        match=r"only 1 of 3 parties have sent their arrays.*Resume the job when more.*party-1: .*disk on fire",
    ):
        run(nodes, in_turn(spec))


def _fail(monkeypatch, *parties):
    from vflair_flower.clients import data_party

    original = data_party.train_round

    def failing(session, *args):
        if session.party in parties:
            raise OSError("disk on fire")
        return original(session, *args)

    monkeypatch.setattr(data_party, "train_round", failing)


def test_composes_with_dp_sgd_with_clipping_at_the_parties_and_with_fedadam(nodes, spec):
    spec = dataclasses.replace(in_turn(spec), privacy=DpSettings(noise_multiplier=0.8, delta=1e-2))
    policy = Policy([REST, MayLeave(tensor="adapters", to="server", covered_by=("secagg", "dp-sgd"))])
    private = run(nodes, spec, app=make_app(policy), aggregator=FedAdam(min_train_nodes=1, min_available_nodes=1))
    assert all(report.privacy["steps"] == 2 for report in private.reports.values())
    assert private.history[0].train_metrics == {}
    assert all(torch.isfinite(tensor).all() for tensor in private.arrays.to_torch_state_dict().values())
    bound = {"noise_multiplier": 1e-6, "clipping_norm": 1e-7, "num_sampled_clients": 3}
    clipped = run(
        nodes,
        plain_of_privacy(spec),
        app=make_app(mods=[masked, beside_session(fixedclipping_mod)]),
        aggregator=DifferentialPrivacyClientSideFixedClipping(fedavg(), **bound),
        job="clipped",
    )
    assert max(float(v.abs().max()) for n, v in clipped.arrays.to_torch_state_dict().items() if "lora_B" in n) < 1e-6


def plain_of_privacy(spec):
    return dataclasses.replace(spec, privacy=None)


@pytest.mark.parametrize("case", ["no mod", "mods the wrong way round", "policy", "out of range"])
def test_a_party_sends_nothing_that_would_be_seen(nodes, spec, case):
    apps = {
        "no mod": (make_app(mods=()), "nothing would mask this party's arrays"),
        "mods the wrong way round": (
            make_app(mods=[beside_session(fixedclipping_mod), masked]),
            "'fixedclipping_mod' would change a reply that is masked already",
        ),
        "policy": (make_app(POLICY), "'adapters'.*not covered by secagg"),
        "out of range": (make_app(), r"has a number beyond \+-0\.001"),
    }
    app, said = apps[case]
    spec = in_turn(spec)
    aggregator = None
    if case == "policy":
        assert run(nodes, spec, app=app, job="obeyed").history[0].lost == {}
        spec = plain(spec)
    elif case == "out of range":
        spec = dataclasses.replace(spec, secure_aggregation=SecAggSettings(clip=1e-3))
    elif "round" in case:
        bound = {"noise_multiplier": 1e-6, "clipping_norm": 1e-7, "num_sampled_clients": 3}
        aggregator = DifferentialPrivacyClientSideFixedClipping(fedavg(), **bound)
    with pytest.raises(SessionError, match=said):
        run(nodes, spec, app=app, on_party_lost="stop", aggregator=aggregator)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"averaging": "step"}, "secure_aggregation is set and averaging is 'step'"),
        ({"experts": ExpertSettings()}, "secure_aggregation is set, and experts are spread"),
        ({"experts": ExpertSettings(), "averaging": "none"}, "secure_aggregation is set, and experts are spread"),
    ],
)
def test_what_it_does_not_go_with_is_refused_at_birth(spec, changes, said):
    with pytest.raises(ConfigurationError, match=said):
        dataclasses.replace(spec, **changes)


def _accounted():
    wrapper = DifferentialPrivacyClientSideFixedClipping(fedavg(), 1.0, 1.0, 3)
    wrapper.accountant = object()
    return wrapper


@pytest.mark.parametrize(
    ("aggregator", "said"),
    [
        (FedMedian, "FedMedian works on each party's own"),
        (
            lambda: DifferentialPrivacyServerSideFixedClipping(fedavg(), 1.0, 1.0, 3),
            "DifferentialPrivacyServerSideFixedClipping works on each party's own",
        ),
        (
            lambda: DifferentialPrivacyClientSideFixedClipping(FedMedian(), 1.0, 1.0, 3),
            "FedMedian works on each party's own",
        ),
        (lambda: fedavg(weighted_by_key="tokens"), "FedAvg weighs by 'tokens'"),
        (_accounted, "DifferentialPrivacyClientSideFixedClipping's accountant checks that all parties weigh"),
    ],
)
def test_aggregators_that_look_at_each_party_are_refused_by_name(spec, aggregator, said):
    with pytest.raises(ConfigurationError, match=said):
        SplitLearning(spec=spec, aggregator=aggregator())
    SplitLearning(spec=plain(spec), aggregator=aggregator())


def test_one_sampled_party_is_refused(nodes, spec):
    with pytest.raises(ConfigurationError, match="a sum over one party is that party's own"):
        run(nodes, spec, aggregator=fedavg(fraction_train=0.4))


def test_a_reply_with_more_than_what_is_summed_is_refused():
    arrays, metrics = ArrayRecord({}), MetricRecord({"num-examples": 3, "loss": 0.5})
    assert secure._parts(RecordDict({"arrays": arrays, "metrics": metrics})) == ({}, {"loss": 0.5}, 3)
    for content, said in [
        (RecordDict({"arrays": arrays, "more": arrays, "metrics": metrics}), "has 2 array records"),
        (RecordDict({"arrays": arrays, "metrics": MetricRecord({"loss": 0.5})}), "'num-examples' is NoneType"),
        (RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1, "l": [1.0]})}), "'l' is a list"),
    ]:
        with pytest.raises(ConfigurationError, match=said):
            secure._parts(content)


def test_the_documented_loop_works(nodes, spec):
    page = (Path(__file__).resolve().parents[2] / "docs" / "secure-aggregation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    app = ClientApp()
    DataParty(rows, state_dir=state_dir).register(app, train=False)
    del app._registered_funcs[f"query.{SECAGG}"]
    given = {"SECAGG": SECAGG, "answer_stage": answer_stage, "masked": masked, "split_session": split_session}
    exec(compile(code, "secure-aggregation.md", "exec"), {**given, "app": app, "train_on_my_rows": lambda session: 4})
    strategy = run(nodes, in_turn(spec), app=app)
    assert strategy.history[0].lost == {}
    assert set(strategy.reports) == {"party-0", "party-1", "party-2", "model-party"}
