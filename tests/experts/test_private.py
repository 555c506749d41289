"""DP-SGD where experts are spread: hosts' clipped sums by hand, noise that is on the account, and what is refused."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from tests.experts.test_job import EXPERTS, PARTIES, kept, nodes, run, spec, tiny_moe  # noqa: F401
from vflair_flower.dp_settings import DpSettings, joint_multiplier
from vflair_flower.errors import ConfigurationError, SessionError
from vflair_flower.experts import ExpertCaller, ExpertHost, load_experts, tune_experts
from vflair_flower.experts.loading import layers_and_placement
from vflair_flower.experts.modules import expert_modules, run_experts
from vflair_flower.experts.private import PrivateExperts
from vflair_flower.partition import load_config, resolve_model
from vflair_flower.privacy.dpsgd import BodyPrivacy, epsilon_of
from vflair_flower.remote.protocol import BACKWARD, FORWARD, STEP
from vflair_flower.session import Reply, Request
from vflair_flower.settings import ExpertSettings, LoraSettings, TrainingSettings

PRIVACY = DpSettings(noise_multiplier=0.8, delta=1e-2, max_grad_norm=0.5)
WIDTH = 32


@pytest.fixture
def private_spec(spec):  # noqa: F811
    training = TrainingSettings(rounds=2, local_steps=2, batch_size=4, max_tokens=16)
    return dataclasses.replace(spec, tuning=LoraSettings(rank=2), training=training, privacy=PRIVACY)


def open_host(spec):  # noqa: F811
    """A host of two parties' experts, whose adapters are not zero."""
    source = resolve_model(spec.model)
    config = load_config(source, spec.task)
    names, placement = layers_and_placement(config, spec, ["alpha", "beta"])
    own = placement.experts_of("beta")
    by_name = dict(zip(names, own, strict=True))
    module = load_experts(source, by_name, spec.task)
    tune_experts(module, by_name, spec, of=EXPERTS)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.3)
    private = PrivateExperts(spec, placement, "beta", server_round=1)
    host = ExpertHost(module, names, own, spec, deadline_s=5.0, private=private)
    host.begin(["alpha"], training=True)
    return host, own, names


def a_call(own, layer, *, combine):
    """Nine tokens of three texts, each for one or two of the host's experts of a layer."""
    generator = torch.Generator().manual_seed(layer)
    pairs = sorted((expert, token) for expert in own[layer] for token in range(9) if (expert + token) % 3)
    tensors = {
        "hidden": torch.randn(9, WIDTH, generator=generator),
        "row": torch.tensor([token for _, token in pairs], dtype=torch.int32),
        "expert": torch.tensor([expert for expert, _ in pairs], dtype=torch.int32),
        "text": torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2], dtype=torch.int32),
    }
    weight_R = torch.rand(len(pairs), generator=generator)
    grad_UD = torch.randn(9, WIDTH, generator=generator) * torch.tensor([0.03] * 4 + [0.001] * 3 + [1e-5] * 2)[:, None]
    back = {"grad": grad_UD}
    (tensors if combine == "host" else back)["weight"] = weight_R
    return tensors, back, weight_R


@pytest.mark.parametrize("combine", ["owner", "host"])
def test_a_hosts_clipped_sums_are_those_made_by_hand(private_spec, combine):
    spec = dataclasses.replace(private_spec, experts=ExpertSettings(combine=combine))  # noqa: F811
    host, own, names = open_host(spec)
    layers = [layer for layer, held in enumerate(own) if held]
    bound = PRIVACY.body_clip / math.sqrt(len(layers))
    expected, whole, clipped_rows = {}, {}, 0
    for number, layer in enumerate(layers):
        tensors, back, weight_R = a_call(own, layer, combine=combine)
        host(Request("alpha", FORWARD, tensors, {"layer": layer, "call": number, "keep": True}))
        reply = host(Request("alpha", BACKWARD, back, {"call": number}))
        module = expert_modules(host.module)[names[layer]]
        place_R = torch.tensor([own[layer].index(int(e)) for e in tensors["expert"]])
        row_R, text_U = tensors["row"].long(), tensors["text"]
        hidden_UD = tensors["hidden"].clone().requires_grad_()
        weights = weight_R.clone().requires_grad_()
        rows_RD = hidden_UD[row_R]
        rows_RD.retain_grad()
        out_RD = run_experts(module, rows_RD, place_R) * weights.unsqueeze(-1)
        loss_R = (out_RD * back["grad"][row_R]).sum(1)
        trained = {name: p for name, p in host.module.named_parameters() if p.requires_grad}
        for text in range(3):
            found = torch.autograd.grad(
                loss_R[text_U[row_R] == text].sum(), list(trained.values()), retain_graph=True, allow_unused=True
            )
            gradient = {n: g for n, g in zip(trained, found, strict=True) if g is not None}
            norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
            clipped_rows += norm > bound
            for name, one in gradient.items():
                expected[name] = expected.get(name, 0.0) + one * min(1.0, bound / norm) / spec.training.batch_size
                whole[name] = whole.get(name, 0.0) + one / spec.training.batch_size
        loss_R.sum().backward()
        returned = rows_RD.grad if combine == "owner" else hidden_UD.grad
        assert float((reply.tensors["grad"] - returned).norm()) < 1e-5 * float(returned.norm())
        if combine == "host":
            assert float((reply.tensors["weight_grad"] - weights.grad).norm()) < 1e-5 * float(weights.grad.norm())
    pending = host._update.pending("alpha")
    assert pending.keys() == expected.keys()
    assert 0 < clipped_rows < 3 * len(layers)
    for name, one in pending.items():
        assert float((one - expected[name]).norm()) < 1e-5 * bound
    assert any(float((one - whole[name]).abs().max()) > 0.1 for name, one in pending.items())


class Noting:
    """A link to a host that answers what it is sent, and keeps it."""

    party = "alpha"

    def __init__(self):
        self.sent = []

    def call(self, _host, _operation, tensors, _meta):
        self.sent.append(tensors)
        return Reply({"output": tensors["hidden"][tensors["row"].long()]})


@pytest.mark.parametrize("rows", [1, 3])
def test_an_owner_says_which_row_a_token_is_of_in_training_alone(private_spec, rows):
    spec = dataclasses.replace(private_spec, wire_dtype="float32")  # noqa: F811
    _, placement = layers_and_placement(load_config(resolve_model(spec.model), spec.task), spec, ["alpha", "beta"])
    link, columns = Noting(), 5
    own = lambda request: link.call("alpha", request.operation, request.tensors, request.meta)  # noqa: E731
    caller = ExpertCaller(link, own, placement, spec)
    caller.privacy = SimpleNamespace(pass_rows=rows)
    tokens = rows * columns
    token_R = torch.arange(tokens).repeat(2)
    expert_R = torch.arange(2).repeat_interleave(tokens)
    rows_RD = token_R[:, None].float().expand(-1, WIDTH)  # a state that says which token it is of
    for keep in (True, False):
        link.sent.clear()
        caller.forward(0, rows_RD, expert_R, token_R, torch.ones(2 * tokens), keep=keep)
        assert link.sent
        for tensors in link.sent:
            assert ("text" in tensors) is keep
            if keep:
                assert torch.equal(tensors["text"].long(), tensors["hidden"][:, 0].long() // columns)
    caller.close()


def test_no_row_changes_a_hosts_sum_by_more_than_its_bound(private_spec):
    sums = []
    for with_it in (True, False):
        host, own, _ = open_host(private_spec)
        for number, layer in enumerate(layer for layer, held in enumerate(own) if held):
            tensors, back, _ = a_call(own, layer, combine="owner")
            if not with_it:  # the first text, whose gradient is by far the longest
                left = tensors["text"] != 0
                place_U = torch.cumsum(left, 0) - 1
                rows = left[tensors["row"].long()]
                tensors = {
                    "hidden": tensors["hidden"][left],
                    "row": place_U[tensors["row"][rows].long()].to(torch.int32),
                    "expert": tensors["expert"][rows],
                    "text": tensors["text"][left],
                }
                back = {"grad": back["grad"][left], "weight": back["weight"][rows]}
            host(Request("alpha", FORWARD, tensors, {"layer": layer, "call": number, "keep": True}))
            host(Request("alpha", BACKWARD, back, {"call": number}))
        sums.append(torch.cat([one.flatten() for _, one in sorted(host._update.pending("alpha").items())]))
    changed = float((sums[0] - sums[1]).norm()) * private_spec.training.batch_size
    assert 0.9 * PRIVACY.body_clip < changed <= PRIVACY.body_clip * (1 + 1e-5)


def test_steps_at_a_host_need_texts_and_noise(private_spec):
    host, own, _ = open_host(private_spec)
    layer = next(layer for layer, held in enumerate(own) if held)
    tensors, _, _ = a_call(own, layer, combine="owner")
    del tensors["text"]
    with pytest.raises(SessionError, match="which row it is of"):
        host(Request("alpha", FORWARD, tensors, {"layer": layer, "call": 0, "keep": True}))
    meta = {"rows": 4, "step": 0, "total_steps": 4, "sample_rate": 0.1}
    for noise in (0.0, 0.8):  # with two hosts each needs 0.8 times 2
        with pytest.raises(SessionError, match="noise of the multiplier"):
            host(Request("alpha", STEP, {}, {**meta, "noise": noise}))
    before = host.trained_state()
    assert host(Request("alpha", STEP, {}, {**meta, "noise": 1.6})).meta == {"noise": 1.6}
    assert all(not torch.equal(before[name], one) for name, one in host.trained_state().items())


@pytest.mark.parametrize("experts", [ExpertSettings(), ExpertSettings(schedule="round-robin", padding="bucket")])
def test_a_private_job_says_what_rows_have_cost_and_noises_every_expert(nodes, private_spec, experts):  # noqa: F811
    strategy, *_ = run(nodes, dataclasses.replace(private_spec, experts=experts, averaging="round"))
    cost = epsilon_of([(0.8, 4 / 24, 4)], 1e-2, "prv")
    for report in strategy.reports.values():
        assert report.privacy["epsilon"] == pytest.approx(cost, rel=1e-6)
        hosts = [report.privacy["body_noise_multiplier"]] * PARTIES
        assert joint_multiplier(report.privacy["own_noise_multiplier"], *hosts) == pytest.approx(0.8)
    for one in kept(nodes, "job", 2):
        adapters = {n: t for n, t in one["host"]["trained"].items() if n.endswith("lora_B")}
        assert adapters
        # Every one: LoRA's B begins at zero, and noise leaves none there.
        assert all(bool((tensor != 0).all()) for tensor in adapters.values())
        assert one["host"]["privacy"].keys() == {f"party-{i}" for i in range(PARTIES)}


def test_frozen_experts_leave_all_noise_to_the_owners(nodes, private_spec):  # noqa: F811
    frozen = dataclasses.replace(private_spec, experts=ExpertSettings(trained="none"))
    strategy, *_ = run(nodes, frozen, num_rounds=1)
    for report in strategy.reports.values():
        assert report.privacy["own_noise_multiplier"] == pytest.approx(0.8)
        assert report.privacy["body_noise_multiplier"] == 0.0


def test_a_host_that_leaves_its_noise_out_is_found(nodes, private_spec, monkeypatch):  # noqa: F811
    monkeypatch.setattr(BodyPrivacy, "used", lambda self, party: 0.0)
    with pytest.raises(Exception, match="stepped with noise of the multiplier 0"):
        run(nodes, private_spec, num_rounds=1)


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        ({"balance_coefficient": 0.01}, "balance_coefficient"),
        ({"replicas": 2}, "replicas"),
        ({"on_host_lost": "skip"}, "on_host_lost"),
        ({"semantics": "hand-off-token", "schedule": "round-robin"}, "semantics"),
    ],
)
def test_what_lets_hosts_learn_otherwise_is_refused(private_spec, experts, said):
    with pytest.raises(ConfigurationError, match=f"DP-SGD.*{said}"):
        dataclasses.replace(private_spec, experts=ExpertSettings(**experts))


def test_all_parameters_of_a_router_are_refused_by_name(nodes, private_spec):  # noqa: F811
    with pytest.raises(Exception, match=r"gate.*(tune by LoRA|Freeze)"):
        run(nodes, dataclasses.replace(private_spec, tuning=None), num_rounds=1)
