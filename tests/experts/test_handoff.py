"""Hand-off: whose expert weighs most runs the next block; with equal own models all is the whole model's function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.experts.conftest import MOE, batch_of, merged
from vflair_flower.experts import expert_layer_names
from vflair_flower.settings import ExpertSettings

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
        assert float((found.logits - expected.logits)[real_BT].abs().max()) < 2e-5
        own = sums(companies, 0)
        elsewhere = sum(bool(company.lead.pending("party-0")) for company in companies[1:])
        assert elsewhere >= 2  # else nothing was handed off
        assert own.keys() <= gradients.keys()
        worst = max(float((own[n] - gradients[n]).abs().max() / gradients[n].abs().max()) for n in own)
        assert worst < 2e-4
        hosted = {n: g for company in companies for n, g in company.host._update.pending("party-0").items()}
        assert own.keys() | hosted.keys() == gradients.keys()
        placement = house.placement([company.name for company in companies])
        for layer, names in enumerate(expert_layer_names(whole.config, house.spec.task)):
            for company in companies:
                experts = list(placement.experts_of(company.name)[layer])
                for name, gradient in company.host._update.pending("party-0").items():
                    if name.startswith(f"{names}."):
                        scale = gradients[name].abs().max()
                        assert float((gradient - gradients[name][experts]).abs().max() / scale) < 2e-4
