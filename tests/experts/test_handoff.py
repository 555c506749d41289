"""Hand-off: whose expert weighs most runs the next block; with equal own models all is the whole model's function."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.experts.conftest import MOE, batch_of
from tests.experts.test_exact import steps
from vflair_flower.errors import ConfigurationError, PartitionError, PartyLostError, RemoteError, SessionError
from vflair_flower.experts import expert_layer_names
from vflair_flower.experts.behalf import OWNER, on_behalf
from vflair_flower.remote.protocol import BACKWARD, FINISH, FORWARD, STEP
from vflair_flower.session import Request
from vflair_flower.settings import ExpertSettings, LoraSettings, OptimizerSettings

SEMANTICS = ("hand-off-sequence", "hand-off-token")


def handing(semantics: str, **more: Any) -> ExpertSettings:
    return ExpertSettings(semantics=semantics, schedule="round-robin", **more)


def sums(companies: list, owner: int) -> dict[str, Tensor]:
    """Add up what an owner's pass has left at all parties' own models."""
    total = {n: p.grad.clone() for n, p in companies[owner].model.named_parameters() if p.grad is not None}
    for company in companies:
        for name, gradient in company.lead.pending(companies[owner].name).items():
            total[name] = total[name] + gradient if name in total else gradient
    return total


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("family", MOE)
def test_equal_models_are_the_whole_models_function(
    family: str, semantics: str, make_house: Callable[..., Any]
) -> None:
    house = make_house(family, experts=handing(semantics))
    whole, batch = house.whole(), batch_of(0)
    expected = whole(**batch)
    expected.loss.backward()
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    real_BT = batch["attention_mask"].bool()
    with house.open(4) as companies:
        found = companies[0].model(**batch)
        found.loss.backward()
        assert float((found.logits - expected.logits).detach()[real_BT].abs().max()) < 1e-5
        own = sums(companies, 0)
        elsewhere = sum(bool(company.lead.pending("party-0")) for company in companies[1:])
        assert elsewhere >= 2  # else nothing was handed off
        assert own.keys() <= gradients.keys()
        worst = max(float((own[n] - gradients[n]).abs().max() / gradients[n].abs().max()) for n in own)
        assert worst < 2e-5
        hosted = {n: g for company in companies for n, g in company.host._update.pending("party-0").items()}
        assert own.keys() | hosted.keys() == gradients.keys()
        placement = house.placement([company.name for company in companies])
        for layer, names in enumerate(expert_layer_names(whole.config, house.spec.task)):
            for company in companies:
                experts = list(placement.experts_of(company.name)[layer])
                for name, gradient in company.host._update.pending("party-0").items():
                    if name.startswith(f"{names}."):
                        scale = gradients[name].abs().max()
                        assert float((gradient - gradients[name][experts]).abs().max() / scale) < 2e-5


@pytest.mark.parametrize(
    ("family", "semantics"), [*((family, SEMANTICS[1]) for family in MOE), ("mixtral", SEMANTICS[0])]
)
def test_one_party_is_bit_equal(family: str, semantics: str, make_house: Callable[..., Any]) -> None:
    expected, whole, found, end = steps(make_house(family, experts=handing(semantics)), 1)
    assert found == expected
    assert [name for name, p in whole.items() if not torch.equal(end[name], p)] == []


def stitched(models: list[Any], batch: dict[str, Tensor], owner: int, placement: Any, semantics: str) -> Any:
    """Compute, one sequence at a time and with whole models in one process, what hand-off is to compute.

    The models are Mixtrals that share experts.  Returns logits of each sequence and how many tokens each party led.
    """
    logits, led = [], [0] * len(models)
    for ids_T, mask_T in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        hidden = models[owner].model.embed_tokens(ids_T[mask_T.bool()].unsqueeze(0))
        length = hidden.shape[1]
        positions = torch.arange(length).unsqueeze(0)
        rotary = models[owner].model.rotary_emb(hidden, positions)
        leads = [owner] * length
        for index in range(len(models[0].model.layers)):
            rows, routed = torch.zeros_like(hidden), [None] * length
            for party in sorted(set(leads)):
                seen: list[tuple[Tensor, Tensor]] = []
                block = models[party].model.layers[index]
                hook = block.mlp.gate.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out[1:]))
                out = block(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
                hook.remove()
                here = torch.tensor([lead == party for lead in leads]).view(1, length, 1)
                rows = rows + torch.where(here, out, 0.0)
                for t in range(length):
                    if leads[t] == party:
                        led[party] += 1
                        weights, experts = (tensor.view(length, -1)[t] for tensor in seen[0])
                        routed[t] = [
                            (float(w.detach()), placement.host_of[index][int(e)])
                            for w, e in zip(weights, experts, strict=True)
                        ]
            hidden = rows
            if semantics == "hand-off-token":
                leads = [max(pairs, key=lambda pair: pair[0])[1] for pairs in routed]
            else:
                total = [sum(w for pairs in routed for w, host in pairs if host == p) for p in range(len(models))]
                leads = [total.index(max(total))] * length
        logits.append(models[owner].lm_head(models[owner].model.norm(hidden))[0])
    return logits, led


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_models_that_differ_are_stitched_together(semantics: str, make_house: Callable[..., Any]) -> None:
    """Each party's own model is another; logits and every model's gradients are those of the definition."""
    house = make_house("mixtral", experts=handing(semantics))
    batch = batch_of(1, rows=4)
    del batch["labels"]
    with house.open(3) as companies:
        wholes = [house.whole() for _ in companies]
        shared = [(n, p) for n, p in wholes[0].named_parameters() if ".experts." in n]
        for number, (company, whole) in enumerate(zip(companies, wholes, strict=True)):
            generator = torch.Generator().manual_seed(number)
            own = dict(company.model.named_parameters())
            with torch.no_grad():
                for name, p in whole.named_parameters():
                    if name in own:
                        p.add_(torch.randn(p.shape, generator=generator) * 0.03)
                        own[name].copy_(p)
            for name, p in shared:
                parent, _, leaf = name.rpartition(".")
                setattr(whole.get_submodule(parent), leaf, p)
        placement = house.placement([company.name for company in companies])
        expected, led = stitched(wholes, batch, 0, placement, semantics)
        alone = wholes[0](**batch).logits
        found = companies[0].model(**batch).logits
        weights = [torch.randn(part.shape, generator=torch.Generator().manual_seed(9)) for part in expected]
        sum((part * w).sum() for part, w in zip(expected, weights, strict=True)).backward()
        lengths = batch["attention_mask"].sum(-1).tolist()
        parts = [row[:length] for row, length in zip(found, lengths, strict=True)]
        for part, want in zip(parts, expected, strict=True):
            assert float((part - want).detach().abs().max()) < 1e-5
        assert float((parts[1] - alone[1]).detach().abs().max()) > 1e-2  # the others' models do count
        padding = int((1 - batch["attention_mask"]).sum()) * len(wholes[0].model.layers)
        assert sum(companies[0].handing.led) == sum(led) + padding
        assert all(0 <= more - fewer <= padding for more, fewer in zip(companies[0].handing.led, led, strict=True))
        sum((part * w).sum() for part, w in zip(parts, weights, strict=True)).backward()
        for company, whole in zip(companies, wholes, strict=True):
            own = {n: p.grad for n, p in company.model.named_parameters() if p.grad is not None}
            own = own or company.lead.pending("party-0")
            wanted = {n: p.grad for n, p in whole.named_parameters() if ".experts." not in n and p.grad is not None}
            assert own.keys() == wanted.keys()
            for name, gradient in own.items():
                assert float((gradient - wanted[name]).abs().max() / wanted[name].abs().max()) < 2e-5, name


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_lora_is_pefts_on_the_whole_model(semantics: str, make_house: Callable[..., Any]) -> None:
    from vflair_flower.partition import Segment, load_segment, make_trainable

    tuning = LoraSettings(rank=2, target_modules=("q_proj", "v_proj"))
    house = make_house("mixtral", experts=handing(semantics, trained="none"), tuning=tuning)
    loaded = load_segment(house.source, Segment.whole(4), house.spec.task, seed=3)
    whole = make_trainable(loaded, tuning, house.spec.task, seed=3)
    with house.open(3) as companies:
        for model in (whole, *(company.model for company in companies)):
            with torch.no_grad():
                for number, p in enumerate(p for p in model.parameters() if p.requires_grad):
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        whole.train()(**batch_of(0)).loss.backward()
        companies[0].model(**batch_of(0)).loss.backward()
        wanted = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
        found = sums(companies, 0)
        assert found.keys() == wanted.keys()
        assert any(company.lead.pending("party-0") for company in companies[1:])
        for name, gradient in found.items():
            assert float((gradient - wanted[name]).abs().max() / wanted[name].abs().max()) < 2e-5, name


def test_others_gradients_count_at_a_partys_own_step(make_house: Callable[..., Any]) -> None:
    sgd = OptimizerSettings(name="sgd", learning_rate=0.5, schedule="constant")
    house = make_house("mixtral", experts=handing("hand-off-token"), optimizer=sgd)
    with house.open(2) as (first, second):
        before = {n: p.detach().clone() for n, p in second.model.named_parameters()}
        first.train(batch_of(0))
        waiting = second.lead.state()
        assert waiting
        assert not second.lead.pending("party-0")
        assert all(torch.equal(p, before[n]) for n, p in second.model.named_parameters())
        second.optimizer.zero_grad()
        second.model(**batch_of(1)).loss.backward()
        own = {n: p.grad.clone() for n, p in second.model.named_parameters() if p.grad is not None}
        second.lead.add_gradients()
        second.optimizer.step()
        second.caller.step(step=0, total_steps=0)
        assert not second.lead.state()
        for name, p in second.model.named_parameters():
            both = own.get(name, torch.zeros(())) + waiting.get(name, torch.zeros(()))
            assert torch.equal(p, before[name].add(both, alpha=-0.5)), name


def test_what_an_owner_has_not_stepped_with_is_dropped_when_it_leaves(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=handing("hand-off-token"))
    with house.open(2) as (first, second):
        first.model(**batch_of(0)).loss.backward()
        assert second.lead.pending("party-0")
        first.caller.finish()
        assert not second.lead.pending("party-0")
        assert not second.lead.state()
        assert second.train(batch_of(1)) > 0.0  # the turn has come to it


def test_nobody_speaks_for_another_but_a_lead_that_runs_its_own_calls(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=handing("hand-off-token"))
    with house.open(3) as (first, second, third):
        first.model(**batch_of(0)).loss  # noqa: B018 - leaves calls open at hosts
        kept = dict(second.host._kept)
        assert {source for source, _ in kept} == {"party-0"}  # whoever asked

        def spoken(speaker: str, number: int) -> tuple[str, int]:
            request = Request(speaker, BACKWARD, {}, {OWNER: "party-0", "call": number})
            named = on_behalf(request, house.spec.experts)
            return named.source, named.meta["call"]

        numbers = range(1, 40)
        of_second = [number for number in numbers if spoken("party-1", number) in kept]
        of_third = [number for number in numbers if spoken("party-2", number) in kept]
        others = set(of_third) - set(of_second)
        assert others
        link, asked = third.lead._callers["party-0"]._link, {"grad": torch.zeros(1, 64), "weight": torch.zeros(1)}
        for number in others:  # a call that another has made is not to be found under one's own name
            with pytest.raises(SessionError, match="not open"):
                second.lead._in_name("party-0")(Request("party-1", BACKWARD, asked, {"call": number}))
        with pytest.raises(RemoteError, match="sent the gradient of 1 tokens"):  # its own are
            link.call("party-1", BACKWARD, asked, {"call": of_third[0]})
        for operation in (STEP, FINISH):
            with pytest.raises(SessionError, match="speaks for others"):
                second.host(Request("party-2", operation, {}, {OWNER: "party-0", "rows": 1, "call": 1}))
    plain = make_house("mixtral", experts=ExpertSettings(schedule="round-robin"))
    with plain.open(2) as (_, second), pytest.raises(SessionError, match="speaks for others"):
        second.host(Request("party-1", FORWARD, {}, {OWNER: "party-0", "call": 1, "layer": 0, "keep": True}))


@pytest.mark.parametrize(
    ("fault", "operation"),
    [
        *((fault, operation) for fault in ("raises", "nan", "slow") for operation in ("block", "block-backward")),
        ("names a lead that is not", "block"),
    ],
)
def test_a_lead_that_fails_ends_the_pass(fault: str, operation: str, make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=handing("hand-off-token"))
    with house.open(2, deadline_s=2.0) as (first, second):
        kind = "_forward" if operation == "block" else "_backward"
        run = getattr(second.lead, kind)

        def answer(request: Request) -> Any:
            if fault == "raises":
                raise RuntimeError("power cut")
            if fault == "slow":
                time.sleep(2.2)
            reply = run(request)
            if fault == "nan":
                next(iter(reply.tensors.values()))[:] = float("nan")
            elif fault.startswith("names"):
                reply.tensors["lead"][0] = 7
            return reply

        setattr(second.lead, kind, answer)
        said = {"raises": "power cut", "nan": "not finite", "slow": "no answer within"}.get(fault, "named")
        with pytest.raises(SessionError, match=said):
            first.model(**batch_of(0)).loss.backward()


def test_a_lead_that_is_lost_is_named(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=handing("hand-off-sequence"))
    with house.open(2, deadline_s=5.0) as (first, second):

        def cut(request: Request) -> Any:
            second.caller._link.abandon()
            raise RuntimeError("power cut")

        second.lead._forward = cut
        with pytest.raises(PartyLostError, match="party-1"):
            first.model(**batch_of(0))


def test_a_pass_that_needs_a_cache_or_packs_texts_is_refused(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral", experts=handing("hand-off-sequence"))
    with house.open(1, training=False) as (only,), torch.no_grad():
        ids_BT = batch_of(0)["input_ids"]
        with pytest.raises(PartitionError, match="key-value cache"):
            only.model(input_ids=ids_BT, use_cache=True)
        with pytest.raises(PartitionError, match="position ids begin anew"):
            only.model(input_ids=ids_BT, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"semantics": "hand-over"}, "semantics is 'hand-over'"),
        ({"schedule": "concurrent"}, "schedule 'concurrent'"),
        ({"replicas": 2}, "replicas 2"),
        ({"on_host_lost": "skip"}, "on_host_lost 'skip'"),
        ({"opted_out": (1,)}, r"opted_out \(1,\)"),
        ({"local_tolerance": 0.5}, "local_tolerance 0.5"),
        ({"balance_coefficient": 0.01}, "balance_coefficient 0.01"),
        ({"backbone": "split", "schedule": "concurrent"}, "must be 'round-robin'"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ExpertSettings(**{"semantics": "hand-off-token", "schedule": "round-robin", **change})
