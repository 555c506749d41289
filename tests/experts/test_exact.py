"""An owner whose experts are spread over hosts computes and trains what the whole model does, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.experts.conftest import MOE, batch_of, merged
from vflair_flower.experts import expert_layer_names


def steps(house: Any, count: int, number: int = 3) -> tuple[list, dict, list, dict]:
    """Train the whole model, and one owner beside `count - 1` hosts."""
    whole = house.whole()
    optimizer = house.spec.optimizer.build(list(whole.parameters()))
    expected, found = [], []
    for step in range(number):
        optimizer.zero_grad()
        output = whole(**batch_of(step))
        output.loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
        optimizer.step()
        expected.append(float(output.loss.detach()))
    with house.open(count) as companies:
        owner, *others = companies
        for other in others:
            other.caller.finish()
        first = owner.model(**batch_of(0))
        first.loss.backward()
        own = {name: p.grad.clone() for name, p in owner.model.named_parameters() if p.grad is not None}
        placement = house.placement([c.name for c in companies])
        layers = expert_layer_names(whole.config, house.spec.task)
        for company in companies:
            for name, gradient in company.host._update.pending(owner.name).items():
                layer = next(i for i, own in enumerate(layers) if name.startswith(f"{own}."))
                experts = list(placement.experts_of(company.name)[layer])
                assert torch.equal(gradient, gradients[name][experts]), name
            company.host._update.drop(owner.name)
        owner.caller.rows_since_step = 0
        for step in range(number):
            found.append(owner.train(batch_of(step), step))
        end = merged(companies, house)
    assert own.keys() <= gradients.keys()
    assert [name for name in own if not torch.equal(own[name], gradients[name])] == []
    return expected, dict(whole.named_parameters()), found, end


@pytest.mark.parametrize("count", [2, 8])  # 1 and 4 between processes
@pytest.mark.parametrize("family", MOE)
def test_return_is_bit_equal(family: str, count: int, make_house: Callable[..., Any]) -> None:
    expected, whole, found, end = steps(make_house(family), count)
    assert found == expected
    assert end.keys() == whole.keys()
    assert [name for name, p in whole.items() if not torch.equal(end[name], p)] == []
