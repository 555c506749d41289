"""What routers choose when experts are masked or preferred, against the rule itself, token by token and by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.experts.conftest import MOE, batch_of
from vflair_flower.certificate import TINY
from vflair_flower.errors import ConfigurationError, ModelError
from vflair_flower.experts import prefer_experts, route_locally
from vflair_flower.experts.routing import _routers
from vflair_flower.session import Reply, Request
from vflair_flower.settings import ExpertSettings

OWN = (1, 6)
MASKED = (0, 5)


def tiny(family: str) -> PreTrainedModel:
    """Return a model; "deepseek-v2-groups" chooses groups by their best expert."""
    config = TINY[family.removesuffix("-groups")]()
    if family.endswith("-groups"):
        config.topk_method, config.n_group, config.topk_group = "group_limited_greedy", 4, 2
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name or ".router." in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    return model.eval()


def chosen(model: PreTrainedModel, **preferences: Any) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Return each router's logits, weights and choice."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    with prefer_experts(model, **preferences), torch.no_grad():
        handles = [
            router.register_forward_hook(lambda _m, _a, out, layer=layer: seen.__setitem__(layer, out))
            for layer, router in _routers(model).items()
        ]
        model(**batch_of(0))
    for handle in handles:
        handle.remove()
    return seen


def scores_of(family: str, model: PreTrainedModel, layer: int, logits: Tensor) -> tuple[list[float], list[float]]:
    """Return what one token's experts are ranked by, and what weights are made of."""
    if family == "gpt-oss":
        return logits.tolist(), logits.tolist()
    if family == "deepseek-v3":
        scores = logits.float().sigmoid()
        bias = _routers(model)[layer].e_score_correction_bias
        return (scores + bias).tolist(), scores.tolist()
    scores = logits.float().softmax(-1)
    return scores.tolist(), scores.tolist()


def candidates(model: PreTrainedModel, ranks: list[float], masked: tuple[int, ...]) -> list[int]:
    """Return the experts that a token may be routed to at all, by the family's rule for groups."""
    left = [expert for expert in range(len(ranks)) if expert not in masked]
    groups = getattr(model.config, "n_group", None) or 1
    if groups == 1:
        return left
    size, by_best = len(ranks) // groups, 1 if model.config.model_type == "deepseek_v2" else 2
    worth = []
    for group in range(groups):
        inside = sorted((ranks[e] for e in left if e // size == group), reverse=True)[:by_best]
        worth.append((sum(inside) if len(inside) == by_best else -math.inf, group))
    best = {group for _, group in sorted(worth, reverse=True)[: model.config.topk_group]}
    return [expert for expert in left if expert // size in best]


def weights_by_rule(family: str, model: PreTrainedModel, scores: list[float]) -> list[float]:
    config = model.config
    if family == "gpt-oss":
        powers = [math.exp(score) for score in scores]
        return [power / sum(powers) for power in powers]
    renormalised = family == "mixtral" or getattr(config, "norm_topk_prob", False)
    if family.startswith("deepseek-v2"):
        renormalised = False
    factor = getattr(config, "routed_scaling_factor", 1.0)
    return [factor * score / (sum(scores) if renormalised else 1.0) for score in scores]


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
@pytest.mark.parametrize("masked", [(), MASKED], ids=["all", "masked"])
@pytest.mark.parametrize("family", [*MOE, "deepseek-v2-groups"])
def test_routers_choose_by_the_rule_and_weigh_by_their_own_scores(
    family: str, masked: tuple[int, ...], tolerance: float
) -> None:
    model = tiny(family)
    plain = chosen(model)
    layers = list(plain)
    found = chosen(
        model,
        masked=dict.fromkeys(layers, masked),
        preferred=dict.fromkeys(layers, OWN),
        tolerance=tolerance,
    )

    def margin(score: float) -> float:
        """By how much another expert's score must be above that of a preferred one."""
        return math.log1p(tolerance) if family == "gpt-oss" else tolerance * abs(score)

    for layer in layers:
        logits_TE, weight_TK, expert_TK = found[layer]
        for logits, weights, experts in zip(logits_TE, weight_TK.tolist(), expert_TK.tolist(), strict=True):
            ranks, scores = scores_of(family, model, layer, logits)
            allowed = candidates(model, ranks, masked)
            assert set(experts) <= set(allowed)
            assert len(set(experts)) == 2
            for taken in experts:
                for left in set(allowed) - set(experts):
                    lead = ranks[taken] - ranks[left]
                    if taken in OWN and left not in OWN:
                        assert lead >= -margin(ranks[taken]) - 1e-6
                    elif left in OWN and taken not in OWN:
                        assert lead >= margin(ranks[left]) - 1e-6
                    else:
                        assert lead >= -1e-6
            assert weights == pytest.approx(weights_by_rule(family, model, [scores[e] for e in experts]), rel=2e-5)
    # The first router sees the same tokens as before: it changes its mind where, and only where, it is told to.
    moved = plain[0][2].sort().values != found[0][2].sort().values
    assert bool(moved.any()) is bool(masked or tolerance)
    if tolerance and not masked:
        own = [torch.isin(out[0][2], torch.tensor(OWN)).sum() for out in (plain, found)]
        assert own[1] > own[0]


@pytest.mark.parametrize("family", MOE)
def test_nothing_asked_is_nothing_changed(family: str) -> None:
    model = tiny(family)
    expected = model(**batch_of(0)).logits
    with prefer_experts(model, masked={0: ()}, preferred={0: OWN}):
        assert not [router for router in _routers(model).values() if "forward" in vars(router)]
    with prefer_experts(model, masked=dict.fromkeys(range(3), MASKED)):
        with prefer_experts(model, preferred=dict.fromkeys(range(3), OWN), tolerance=1.0):
            assert not torch.equal(model(**batch_of(0)).logits, expected)
        assert not torch.equal(model(**batch_of(0)).logits, expected)
    assert torch.equal(model(**batch_of(0)).logits, expected)


def test_checkpointed_gradients_are_those_of_the_same_choice() -> None:
    grads = []
    for checkpointed in (False, True):
        model = tiny("mixtral").train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with prefer_experts(model, masked=dict.fromkeys(range(4), MASKED), preferred={0: OWN}, tolerance=0.5):
            model(**batch_of(0)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert [name for name, grad in grads[0].items() if not torch.equal(grad, grads[1][name])] == []
    experts = grads[0]["model.layers.1.mlp.experts.down_proj"].abs().amax((1, 2))
    assert experts[list(MASKED)].tolist() == [0.0, 0.0]
    assert float(grads[0]["model.layers.1.mlp.gate.weight"].abs().max()) > 0


def test_a_session_routes_as_the_whole_model_does_and_leaves_opted_out_parties_in_peace(
    make_house: Callable[..., Any],
) -> None:
    """Owner 0 prefers its own experts, party 2 has opted out; copies go round it."""
    settings = ExpertSettings(opted_out=(2,), local_tolerance=0.3, replicas=2, on_host_lost="replica")
    house = make_house("qwen3-moe", experts=settings)
    whole = house.whole()
    optimizer = house.spec.optimizer.build(list(whole.parameters()))
    placement = house.placement([f"party-{i}" for i in range(4)])
    opted_out = {layer: [e for e in range(8) if homes[e] == 2] for layer, homes in enumerate(placement.host_of)}
    own = dict(enumerate(placement.experts_of("party-0")))
    expected = []
    with prefer_experts(whole, masked=opted_out, preferred=own, tolerance=0.3):
        for step in range(3):
            optimizer.zero_grad()
            loss = whole(**batch_of(step)).loss
            loss.backward()
            optimizer.step()
            expected.append(float(loss.detach()))
    asked: list[str] = []
    with house.open(4) as companies:
        owner = companies[0]
        quiet = companies[2]
        before = [p.detach().clone() for p in quiet.host.module.parameters()]
        for other in companies[1:]:
            other.caller.finish()
        answer = quiet.host.__call__
        quiet.caller._link._handler = lambda request: asked.append(request.operation) or answer(request)
        with route_locally(owner.model, settings, placement, owner.name):
            assert [owner.train(batch_of(step), step) for step in range(3)] == expected
        owner.caller.finish()
        for name, parameter in owner.model.named_parameters():
            assert torch.equal(parameter, dict(whole.named_parameters())[name]), name
        assert all(torch.equal(p, old) for p, old in zip(quiet.host.module.parameters(), before, strict=True))
    assert asked == ["finish"]
    for layer in range(4):
        held = [e for host in ("party-0", "party-1", "party-3") for e in placement.experts_of(host)[layer]]
        assert sorted(held) == sorted(2 * [e for e in range(8) if e not in opted_out[layer]])
        assert list(placement.experts_of("party-2")[layer]) == opted_out[layer]


def test_preferring_own_experts_sends_less(make_house: Callable[..., Any]) -> None:
    rows = []
    for tolerance in (0.0, 0.5, 1e6):
        settings = ExpertSettings(local_tolerance=tolerance)
        house = make_house("olmoe", experts=settings)
        sent: list[Request] = []
        with house.open(2, training=False) as companies:
            host = companies[1]

            def handle(request: Request, host: Any = host, sent: list[Request] = sent) -> Reply:
                sent.append(request)
                return host.host(request)

            host.caller._link._handler = handle
            placement = house.placement(["party-0", "party-1"])
            with torch.no_grad(), route_locally(companies[0].model, settings, placement, "party-0"):
                companies[0].model(**batch_of(0))
        rows.append(sum(len(request.tensors["row"]) for request in sent))
    assert rows[0] > rows[1] > rows[2] == 0


@pytest.mark.parametrize(
    ("family", "masked", "message"),
    [
        ("mixtral", range(7), r"in layer 1, 7 of 8 experts are masked or opted out, .* left with 1 of the 2"),
        ("mixtral", (8,), "expert 8 of layer 1 is masked; there are the experts 0 to 7"),
        ("deepseek-v3", (0, 1, 2, 4, 5, 6), "in the 1 groups that it is routed to, with 0 of the 2"),
        ("deepseek-v2-groups", (0, 1, 2, 3, 4, 5), "in the 2 groups that it is routed to, with 0 of the 2"),
    ],
)
def test_too_few_experts_are_refused(family: str, masked: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message), prefer_experts(tiny(family), masked={1: tuple(masked)}):
        pass


def test_settings_and_models_that_cannot_be() -> None:
    with pytest.raises(ConfigurationError, match=r"local_tolerance is -0\.1"):
        ExpertSettings(local_tolerance=-0.1)
    with pytest.raises(ConfigurationError, match=r"opted_out is \(1, 1\)"):
        ExpertSettings(opted_out=(1, 1))
    with pytest.raises(ConfigurationError, match="tolerance is inf"), prefer_experts(tiny("olmoe"), tolerance=math.inf):
        pass
    dense = AutoModelForCausalLM.from_config(TINY["llama"]())
    with pytest.raises(ModelError, match="which has no experts"), prefer_experts(dense, masked={0: (1,)}):
        pass
    model = tiny("olmoe")
    router = _routers(model)[0]
    router.forward = lambda hidden: (hidden, hidden[..., :2], torch.zeros(len(hidden), 2, dtype=torch.int64))
    with (
        pytest.raises(ModelError, match=r"did not choose experts by torch\.topk"),
        prefer_experts(model, masked={0: MASKED}),
    ):
        model(**batch_of(0))
