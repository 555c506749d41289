"""An owner's blocks computed again in the backward pass: the same bits, and no host is called twice."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.experts.conftest import MOE, House, batch_of
from vflair_flower.errors import SessionError
from vflair_flower.experts.balance import load_balance
from vflair_flower.memory import count_kept
from vflair_flower.partition import load_config
from vflair_flower.settings import ExpertSettings, LoraSettings


def again(house: House, on: bool) -> House:
    training = dataclasses.replace(house.spec.training, gradient_checkpointing=on)
    return House(spec=dataclasses.replace(house.spec, training=training), source=house.source)


def two_steps(house: House) -> dict[str, Any]:
    with house.open(2) as companies:
        owner, host = companies
        host.caller.finish()
        calls: list[str] = []
        answer = host.host.__call__
        host.caller._link._handler = lambda request: calls.append(request.operation) or answer(request)
        balanced = house.spec.experts.balance_coefficient
        with load_balance(owner.model, house.spec) if balanced else nullcontext():
            with count_kept(owner.model.parameters()) as kept_bytes:
                loss = owner.model(**batch_of(0)).loss
            per_row = 27 * load_config(house.source, house.spec.task).get_text_config().num_experts_per_tok
            answers = len(owner.host._modules) * per_row * 64 * 4  # what hosts answered, which autograd does not see
            loss.backward()
            left = sum(len(company.host._kept) for company in companies)
            owner.optimizer.step()
            owner.caller.step(step=0, total_steps=0)
            losses = [float(loss.detach()), owner.train(batch_of(1), 1)]
        trained = [
            p.detach().clone() for m in (owner.model, *(c.host.module for c in companies)) for p in m.parameters()
        ]
        return {
            "trained": trained,
            "losses": losses,
            "calls": calls,
            "kept": kept_bytes(),
            "answers": answers,
            "left": left,
            "tokens": owner.caller.tokens,
        }


@pytest.mark.parametrize(
    ("family", "more"),
    [
        *((family, {}) for family in MOE),
        ("mixtral", {"tuning": LoraSettings(rank=4, target_modules=("q_proj", "v_proj"))}),
        ("olmoe", {"experts": ExpertSettings(combine="host")}),
        ("olmoe", {"experts": ExpertSettings(schedule="round-robin", balance_coefficient=0.5)}),
    ],
    ids=[*MOE, "lora", "combined", "balanced"],
)
def test_it_is_the_same_with_as_many_calls_and_less_memory(
    family: str, more: dict, make_house: Callable[..., Any]
) -> None:
    house = make_house(family, **more)
    plain, found = two_steps(again(house, False)), two_steps(again(house, True))
    assert found["losses"] == plain["losses"]
    assert all(torch.equal(one, other) for one, other in zip(found["trained"], plain["trained"], strict=True))
    assert found["calls"] == plain["calls"]
    assert found["tokens"] == plain["tokens"] == 2 * 27
    assert found["left"] == plain["left"] == 0
    assert 0 < found["kept"] + found["answers"] < plain["kept"] / 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_others_compute_again_is_refused(reentrant: bool, make_house: Callable[..., Any]) -> None:
    with make_house().open(2) as companies:
        model = companies[0].model
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(**batch_of(0)).loss
        with pytest.raises(SessionError, match="would call the hosts of its experts a second time"):
            loss.backward()
