"""Which tokens hosts get under a routing gap and of private tokens: counted in what crossed, not in what was meant."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.experts.conftest import MOE, Company, batch_of
from vflair_flower.certificate import TINY
from vflair_flower.errors import ConfigurationError, ModelError
from vflair_flower.experts import rare_tokens, route_locally
from vflair_flower.experts.dispatch import Portion
from vflair_flower.experts.token_routing import host_groups, places
from vflair_flower.settings import ExpertSettings
from vflair_flower.tasks import EncodedText

PRIVATE = torch.arange(128) % 3 == 1


def by_number(ids_BT: Tensor) -> Tensor:
    return PRIVATE[ids_BT]


GROUPED = {"placement": "capacity", "capacities": (1.0, 1.0, 1.0, 1.0)}
"""Whole groups of experts at each party, for a family that takes all of a token's experts from one group."""

Seen = dict[tuple[str, int], set[tuple[int, int]]]
"""By host and layer, row and column of each token that came there."""


@contextmanager
def watched(company: Company, columns: list[int]) -> Iterator[Seen]:
    """Note what leaves a company's caller; `columns` says how many tokens each row has in each pass, or is filled."""
    seen: Seen = defaultdict(set)
    done = 0

    def note(_call: int, portion: Portion) -> None:
        width = columns[-1]
        for token in portion.tokens_U.tolist():
            seen[portion.host, portion.layer].add((token // width, done + token % width))

    def before(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal done
        cache = kwargs.get("past_key_values")
        done = 0 if cache is None else int(cache.get_seq_length())
        entered = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        columns.append(entered.shape[1])

    handle = company.model.base_model.register_forward_pre_hook(before, with_kwargs=True)
    company.caller.watch = note
    try:
        yield seen
    finally:
        company.caller.watch = None
        handle.remove()


def over_layers(seen: Seen, host: str) -> list[tuple[int, int]]:
    return sorted({place for (name, _), found in seen.items() if name == host for place in found})


def smallest_gap(found: list[tuple[int, int]]) -> int:
    return min((b[1] - a[1] for a, b in pairwise(found) if a[0] == b[0]), default=99)


def padded_left(batch: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """Return a batch with columns of padding before its rows, one more in each."""
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    rows, columns = ids_BT.shape
    ids, mask = torch.zeros(rows, columns + by + rows).long(), torch.zeros(rows, columns + by + rows).long()
    for row in range(rows):
        start = by + row
        ids[row, start : start + columns], mask[row, start : start + columns] = ids_BT[row], mask_BT[row]
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", MOE)
def test_no_host_gets_two_tokens_within_the_gap_over_all_layers_together(
    make_house: Callable[..., Any], family: str
) -> None:
    dealt = GROUPED if family == "deepseek-v3" else {}
    seen: dict[int, Seen] = {}
    for gap in (3, 1):
        house = make_house(family, experts=ExpertSettings(routing_gap=gap, **dealt))
        with house.open(4) as companies:
            owner = companies[0]
            for other in companies[1:]:
                other.caller.finish()
            placement = house.placement([company.name for company in companies])
            with route_locally(owner.model, house.spec.experts, placement, owner.name), watched(owner, []) as seen[gap]:
                owner.train(batch_of(0))
            owner.caller.finish()
    others = [f"party-{index}" for index in (1, 2, 3)]
    groups = host_groups(placement, "party-0", 3)
    assert groups == {"party-1": 0, "party-2": 1, "party-3": 2}
    for host in others:
        found = over_layers(seen[3], host)
        assert found  # the constraint is not kept by sending nothing
        assert {column % 3 for _, column in found} == {groups[host]}
        assert smallest_gap(found) >= 3
        assert smallest_gap(over_layers(seen[1], host)) == 1
    assert smallest_gap(over_layers(seen[3], "party-0")) == 1


def test_left_padding_batches_and_caches_keep_every_tokens_group(make_house: Callable[..., Any]) -> None:
    """The same rows padded on the left, and run token by token through a cache, show hosts the same tokens."""
    house = make_house("mixtral", experts=ExpertSettings(routing_gap=2))
    batch = {name: tensor for name, tensor in batch_of(0).items() if name != "labels"}
    batch["attention_mask"][:] = 1
    with house.open(4, training=False) as companies, torch.no_grad():
        owner = companies[0]
        placement = house.placement([company.name for company in companies])
        model = owner.model.eval()
        with route_locally(model, house.spec.experts, placement, owner.name):
            with watched(owner, []) as whole:
                expected = model(**batch).logits
            left = padded_left(batch, by=2)
            with watched(owner, []) as moved:
                shifted = model(**left).logits
            with watched(owner, []) as written:
                cache, found = None, []
                for column in range(left["input_ids"].shape[1]):
                    out = model(
                        input_ids=left["input_ids"][:, column : column + 1],
                        attention_mask=left["attention_mask"][:, : column + 1],
                        past_key_values=cache,
                        use_cache=True,
                    )
                    cache = out.past_key_values
                    found.append(out.logits)
    for row in range(3):
        start = 2 + row
        assert torch.allclose(shifted[row, start : start + 9], expected[row], atol=1e-4)
        assert torch.allclose(torch.cat(found, 1)[row, start : start + 9], expected[row], atol=1e-4)
    for host in ("party-1", "party-2", "party-3"):
        plain = over_layers(whole, host)
        for other in (moved, written):
            assert {(r, c - 2 - r) for r, c in over_layers(other, host)} == set(plain)  # and no padding


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_written_under_the_gap(make_house: Callable[..., Any], beams: int) -> None:
    house = make_house("qwen3-moe", experts=ExpertSettings(routing_gap=3))
    left = padded_left(batch_of(0), by=1)
    with house.open(4, training=False) as companies, torch.no_grad():
        owner = companies[0]
        placement = house.placement([company.name for company in companies])
        model = owner.model.eval()
        with route_locally(model, house.spec.experts, placement, owner.name), watched(owner, []) as seen:
            out = model.generate(**left, max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=None)
    assert out.shape[1] == left["input_ids"].shape[1] + 6
    for host in ("party-1", "party-2", "party-3"):
        found = over_layers(seen, host)
        assert smallest_gap(found) >= 3
        assert max(column for _, column in found) > left["input_ids"].shape[1]


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v2", "deepseek-v3", "gpt-oss"])
def test_private_tokens_stay_and_in_training_those_before_them(make_house: Callable[..., Any], family: str) -> None:
    dealt = GROUPED if family == "deepseek-v3" else {}
    house, batch = make_house(family, experts=ExpertSettings(**dealt)), batch_of(1)
    private_BT = by_number(batch["input_ids"])
    before_BT = private_BT.clone()
    before_BT[:, :-1] |= private_BT[:, 1:]
    columns: list[int] = []
    with house.open(4) as companies:
        owner = companies[0]
        for other in companies[1:]:
            other.caller.finish()
        placement = house.placement([company.name for company in companies])
        with route_locally(owner.model, house.spec.experts, placement, owner.name, by_number):
            with watched(owner, columns) as trained:
                owner.train(batch)
            with watched(owner, columns) as used, torch.no_grad():
                owner.model.eval()(**batch)
        with watched(owner, columns) as plain, torch.no_grad():
            owner.model(**batch)
        owner.caller.finish()
    for seen, shut_BT in ((trained, before_BT), (used, private_BT)):
        away = {place for (host, _), found in seen.items() if host != "party-0" for place in found}
        assert away
        assert not any(bool(shut_BT[place]) for place in away)
    away = {place for (host, _), found in plain.items() if host != "party-0" for place in found}
    assert any(bool(private_BT[place]) for place in away)


def test_off_is_bit_equal_and_on_is_another_function(make_house: Callable[..., Any]) -> None:
    house = make_house("olmoe")
    placement = house.placement([f"party-{i}" for i in range(4)])
    model = house.whole()

    def logits() -> Tensor:
        found: Tensor = model(input_ids=batch_of(0)["input_ids"]).logits
        return found

    expected = logits()
    with route_locally(model, ExpertSettings(), placement, "party-0"):
        assert torch.equal(logits(), expected)
    with route_locally(model, ExpertSettings(), placement, "party-0", lambda ids: torch.zeros_like(ids).bool()):
        assert torch.equal(logits(), expected)
    with route_locally(model, ExpertSettings(routing_gap=2), placement, "party-0"):
        assert not torch.allclose(logits(), expected, atol=1e-3)
    assert torch.equal(logits(), expected)


def test_a_session_trains_as_the_whole_model_does_under_the_same_rules(make_house: Callable[..., Any]) -> None:
    """Recomputed blocks too, with another pass between forward and backward."""
    settings = ExpertSettings(routing_gap=3, local_tolerance=0.2, opted_out=(2,))
    house = make_house("mixtral", experts=settings)
    training = replace(house.spec.training, gradient_checkpointing=True)
    house.spec = replace(house.spec, training=training)
    placement = house.placement([f"party-{i}" for i in range(4)])
    whole = house.whole()
    with route_locally(whole, settings, placement, "party-1", by_number):
        losses = [whole(**batch_of(seed)).loss for seed in (0, 1)]
        sum(losses).backward()
    with house.open(4) as companies:
        owner = companies[1]
        with route_locally(owner.model, settings, placement, owner.name, by_number):
            found = [owner.model(**batch_of(seed)).loss for seed in (0, 1)]
            sum(found).backward()
    assert [float(loss.detach()) for loss in found] == [float(loss.detach()) for loss in losses]
    grads = {name: p.grad for name, p in whole.named_parameters()}
    for name, parameter in owner.model.named_parameters():
        assert torch.allclose(parameter.grad, grads[name], atol=1e-6), name


class TestRules:
    def test_places_begin_behind_padding(self) -> None:
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
        found, padding = places((3, 5), 0, mask)
        assert found.tolist() == [[-2, -1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
        assert torch.equal(padding, mask == 0)
        assert [part.tolist() for part in places((3, 1), 4, mask)] == [[[2], [4], [4]], [[False], [True], [True]]]
        assert places((2, 2), 3, None)[0].tolist() == [[3, 4], [3, 4]]
        with pytest.raises(ModelError, match="5 columns are known of 3 rows"):
            places((3, 5), 0, mask[:, None])

    def test_hosts_are_dealt_in_the_order_of_names_behind_the_owner(self, make_house: Callable[..., Any]) -> None:
        placement = make_house(experts=ExpertSettings(opted_out=(3,))).placement([f"p{i}" for i in range(6)])
        assert host_groups(placement, "p1", 2) == {"p2": 0, "p4": 1, "p5": 0, "p0": 1}
        assert host_groups(placement, "p1", 9) == {"p2": 0, "p4": 1, "p5": 2, "p0": 3}

    def test_rare_tokens_are_the_rarest_and_those_that_texts_lack(self) -> None:
        texts = [EncodedText((1, 5, 5, 5, 6, 6, 7, 8), (), "a"), EncodedText((1, 5, 6), (), "b")]
        rule = rare_tokens(texts, share=0.5, vocabulary=10, special_ids=(1,))
        assert rule(torch.arange(10)[None])[0].nonzero().flatten().tolist() == [0, 2, 3, 4, 7, 8, 9]
        every = rare_tokens(texts, share=1.0, vocabulary=10, special_ids=(1,))
        assert int(every(torch.arange(10)).sum()) == 9

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"routing_gap": 0}, "routing_gap is 0"),
            ({"private_share": 1.5}, r"private_share is 1\.5"),
            ({"routing_gap": 2, "replicas": 2}, "replicas 2"),
            ({"routing_gap": 2, "backbone": "split"}, "backbone 'split'"),
            ({"private_share": 0.5, "balance_coefficient": 0.1}, r"balance_coefficient 0\.1"),
            (
                {"routing_gap": 2, "semantics": "hand-off-token", "schedule": "round-robin"},
                "semantics 'hand-off-token'",
            ),
        ],
    )
    def test_settings_that_cannot_be(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            ExpertSettings(**given)

    def test_jobs_that_cannot_be(self, make_house: Callable[..., Any]) -> None:
        """Own experts must do for a token; a rule must be there, and go with the job's copies."""
        model = AutoModelForCausalLM.from_config(TINY["mixtral"]())
        names = [f"party-{i}" for i in range(8)]
        few = make_house().placement(names)
        for settings, rule in ((ExpertSettings(routing_gap=2), None), (ExpertSettings(), by_number)):
            with (
                pytest.raises(ConfigurationError, match="left with 1 of the 2"),
                route_locally(model, settings, few, names[0], rule),
            ):
                pass
        enough = make_house().placement(names[:4])
        without = make_house(experts=ExpertSettings(opted_out=(0,))).placement(names[:4])
        with (
            pytest.raises(ConfigurationError, match="left with 0 of the 2"),
            route_locally(model, ExpertSettings(routing_gap=2), without, names[0]),
        ):
            pass
        with pytest.raises(ConfigurationError, match="not known which tokens are the party's rarest"):
            route_locally(model, ExpertSettings(private_share=0.5), enough, names[0])
        with pytest.raises(ConfigurationError, match="replicas 2"):
            route_locally(model, ExpertSettings(replicas=2), enough, names[0], by_number)
        with (
            pytest.raises(ConfigurationError, match=r"returned torch\.int64"),
            route_locally(model, ExpertSettings(), enough, names[0], lambda ids: ids),
        ):
            model(**batch_of(0))
        with (
            pytest.raises(ModelError, match="call the model with input_ids"),
            route_locally(model, ExpertSettings(), enough, names[0], by_number),
        ):
            model(inputs_embeds=model.get_input_embeddings()(batch_of(0)["input_ids"]))
