"""AdaLoRA on each segment: the budget is kept, the penalty is PEFT's, and plain PEFT loads the result."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import load_trained_state, save_merged_adapter, trained_state
from vflair_flower.partition.ranks import RankBudget
from vflair_flower.remote import BodyMode
from vflair_flower.settings import LoraSettings

ADALORA = LoraSettings(method="adalora", rank=2, alpha=4)
STEPS = 20


def begin(server: Any, party: Any) -> None:
    server.begin([party.name], server_round=1, training=True)
    party.join()


def ranks_of(model: nn.Module) -> list[int]:
    """Ranks that are not zero, by adapted matrix."""
    return [int((p != 0).sum()) for name, p in model.named_parameters() if ".lora_E." in name]


def train(house: Any, steps: range, party: Any = None, server: Any = None) -> tuple[Any, Any]:
    server = server or house.server()
    party = party or house.party("p1", server)
    begin(server, party)
    for step in steps:
        party.train(step, total_steps=STEPS)
    return party, server


def test_each_segment_ends_with_its_own_budget(make_house: Callable[..., Any]) -> None:
    house = make_house(tuning=ADALORA)
    party, server = train(house, range(2))
    for model in (party.model, server.module):
        assert set(ranks_of(model)) == {3}  # 1.5 times as many, at first
    party, server = train(house, range(STEPS))
    for model in (party.model, server.module):
        ranks = ranks_of(model)
        assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks_of(party.model) + ranks_of(server.module))) > 1  # some matter more than others


def test_the_penalty_is_what_peft_adds_to_a_loss(make_house: Callable[..., Any]) -> None:
    house = make_house(tuning=ADALORA)
    whole = house.whole()
    batch = house.party("p1", house.server()).batch(0)
    whole.base_model(**batch).loss.backward()
    with_penalty = {n: p.grad.clone() for n, p in whole.named_parameters() if p.grad is not None}
    whole.zero_grad()
    whole.base_model.model(**batch).loss.backward()
    RankBudget.of(whole).add_penalty()
    for name, gradient in with_penalty.items():
        torch.testing.assert_close(dict(whole.named_parameters())[name].grad, gradient)


def test_plain_peft_loads_what_all_segments_trained(make_house: Callable[..., Any], tmp_path: Path) -> None:
    house = make_house(tuning=ADALORA)
    party, server = train(house, range(STEPS))
    states = [trained_state(party.model), server.trained_state()]
    plain = copy.deepcopy(house.whole().base_model.unload())
    save_merged_adapter(tmp_path, states, plain.config, ADALORA, house.spec.task)
    merged = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    inputs = {key: value for key, value in party.batch(9).items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, party.model.eval()(**inputs).logits)


def test_saved_ranks_go_on_where_they_were(make_house: Callable[..., Any]) -> None:
    house = make_house(tuning=ADALORA)
    party, server = train(house, range(15))
    resumed = house.server()
    again = house.party("p1", resumed)
    resumed.load_state(copy.deepcopy(server.state()))
    load_trained_state(again.model, trained_state(party.model))
    again.ranks.load_state(copy.deepcopy(party.ranks.state()))
    again.optimizer.load_state_dict(copy.deepcopy(party.optimizer.state_dict()))
    train(house, range(15, STEPS), party, server)
    train(house, range(15, STEPS), again, resumed)
    for one, other in ((party.model, again.model), (server.module, resumed.module)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_cannot_be_is_refused(make_house: Callable[..., Any]) -> None:
    house = make_house(tuning=ADALORA)
    with pytest.raises(ConfigurationError, match="body_mode is 'replicated'"):
        house.server(BodyMode.REPLICATED)
    with pytest.raises(ConfigurationError, match="scope is 'local' and the LoRA method 'adalora'"):
        make_house(tuning=ADALORA, scope="local")
    server = house.server()
    party = house.party("p1", server)
    begin(server, party)
    with pytest.raises(Exception, match="the job has 0 optimiser steps"):
        party.train(0)
