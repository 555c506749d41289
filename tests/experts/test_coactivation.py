"""Experts that are chosen together come to one party: what was planted is found, and fewer tokens travel."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.experts.conftest import batch_of
from vflair_flower.errors import ConfigurationError, ModelError
from vflair_flower.experts import count_coactivation, place_by_coactivation
from vflair_flower.experts.modules import expert_modules
from vflair_flower.settings import ExpertSettings


def planted(groups: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Return which group each expert is of, shuffled, and counts in which pairs of a group are half as many again."""
    generator = torch.Generator().manual_seed(seed)
    of_E = torch.cat([torch.full((size,), group) for group, size in enumerate(groups)])
    of_E = of_E[torch.randperm(len(of_E), generator=generator)]
    means_EE = 60.0 + 30.0 * (of_E[:, None] == of_E[None, :])
    counts_EE = torch.poisson(means_EE, generator=generator).triu()
    return of_E, (counts_EE + counts_EE.triu(1).T).long()


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize("parties", [2, 4])
def test_planted_groups_are_found(size: int, parties: int) -> None:
    layers = [planted([size] * parties, seed) for seed in range(3)]
    table = place_by_coactivation(torch.stack([counts for _, counts in layers]), parties)
    for (of_E, counts_EE), hosts in zip(layers, table, strict=True):
        host_E = torch.tensor(hosts)
        assert torch.bincount(host_E).tolist() == [size] * parties
        together = counts_EE[host_E[:, None] == host_E[None, :]].sum()
        assert together >= counts_EE[of_E[:, None] == of_E[None, :]].sum()  # small groups: chance may do better
        if size == 16:
            assert torch.equal(host_E[:, None] == host_E[None, :], of_E[:, None] == of_E[None, :])


def test_shares_are_by_capacity_or_alike_in_turn_and_the_same_every_time() -> None:
    of_E, counts_EE = planted([2, 2, 12], 0)
    counts_LEE = torch.stack([counts_EE] * 2)
    table = place_by_coactivation(counts_LEE, 3, capacities=(1.0, 1.0, 6.0))
    host_E = torch.tensor(table[0])
    assert torch.bincount(host_E).tolist() == [2, 2, 12]
    assert torch.equal(host_E == 2, of_E == 2)
    alike = place_by_coactivation(counts_LEE, 3)
    assert [torch.bincount(torch.tensor(layer)).tolist() for layer in alike] == [[6, 5, 5], [5, 6, 5]]
    assert alike == place_by_coactivation(counts_LEE.clone(), 3)


def test_counts_are_of_tokens_that_two_experts_share(make_house: Callable[..., Any]) -> None:
    whole = make_house("deepseek-v3").whole()
    choices: list[Tensor] = []
    first = next(iter(expert_modules(whole).values()))
    handle = first.register_forward_pre_hook(lambda _module, args: choices.append(args[1]))
    counts_LEE = count_coactivation(whole, [batch_of(0), batch_of(1, rows=5)])
    handle.remove()
    assert whole.training
    assert not first._forward_pre_hooks
    assert counts_LEE.shape == (3, 8, 8)
    expected = torch.zeros(8, 8, dtype=torch.int64)
    for one, other in torch.cat(choices).tolist():
        for pair in ((one, other), (other, one), (one, one), (other, other)):
            expected[pair] += 1
    assert torch.equal(counts_LEE[0], expected)
    assert counts_LEE.diagonal(dim1=1, dim2=2).sum(-1).tolist() == [2 * 9 * (3 + 5)] * 3


def sent(house: Any) -> int:
    """Return U: how many tokens all four owners send to remote hosts, over all layers, for rows not counted on."""
    tokens = 0
    with house.open(4, training=False) as companies:
        for company in companies:
            with torch.no_grad():
                company.model.eval()(**batch_of(9, rows=8))
            entries = company.caller._link.ledger.entries()
            outgoing = [e for e in entries if e.tensor == "hidden" and e.direction == "up"]
            tokens += sum(entry.bytes for entry in outgoing) // (64 * 4)
    return tokens


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt-oss"])
def test_fewer_tokens_travel_than_by_turns(family: str, make_house: Callable[..., Any]) -> None:
    by_turns = make_house(family)
    counts_LEE = count_coactivation(by_turns.whole(), [batch_of(seed, rows=8) for seed in range(4)])
    table = place_by_coactivation(counts_LEE, 4)
    grouped = replace(by_turns, spec=replace(by_turns.spec, experts=ExpertSettings(placement="table", table=table)))
    before, after = sent(by_turns), sent(grouped)
    assert after < before


def test_in_a_session_the_counts_are_those_of_the_whole_model(make_house: Callable[..., Any]) -> None:
    house = make_house("mixtral")
    expected = count_coactivation(house.whole(), [batch_of(0)])
    with house.open(2, training=False) as companies:
        assert torch.equal(count_coactivation(companies[0].model, [batch_of(0)]), expected)


def test_what_cannot_be_counted_or_placed(make_house: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"counts of shape \(4, 4\)"):
        place_by_coactivation(torch.ones(4, 4), 2)
    with pytest.raises(ConfigurationError, match="5 parties are to share 4 experts"):
        place_by_coactivation(torch.ones(1, 4, 4), 5)
    with pytest.raises(ConfigurationError, match="capacities has 1 numbers for 2 parties"):
        place_by_coactivation(torch.ones(1, 4, 4), 2, capacities=(1.0,))
    whole = make_house("mixtral").whole()
    for layer in whole.model.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(ModelError, match="no experts to count"):
        count_coactivation(whole, [batch_of(0)])
