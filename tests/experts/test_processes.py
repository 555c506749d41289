"""Hosts in processes of their own, gRPC streams between them: still the whole model, bit for bit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.experts.conftest import MOE, batch_of
from tests.experts.worker import Invitation, Worker, first_gradients
from vflair_flower.experts import (
    ExpertCaller,
    ExpertHost,
    expert_agreement,
    expert_layer_names,
    load_backbone,
    load_experts,
)
from vflair_flower.partition.sources import load_config
from vflair_flower.session import Hub, connect

pytestmark = pytest.mark.timeout(300)
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[Callable[[int], list[Worker]]]:
    """Processes as many as are asked for, kept for the next test."""
    made: list[Worker] = []

    def get(count: int) -> list[Worker]:
        new = [Worker() for _ in range(count - len(made))]
        for worker in new:
            worker.wait_ready()
        made.extend(new)
        return made[:count]

    yield get
    for worker in made:
        worker.close()


@pytest.mark.parametrize("count", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", MOE)
def test_three_steps_between_processes_are_those_of_the_whole_model(
    family: str, count: int, make_house: Callable[..., Any], hosts: Callable[[int], list[Worker]]
) -> None:
    house, workers = make_house(family), hosts(count - 1)
    whole = house.whole()
    optimizer = house.spec.optimizer.build(list(whole.parameters()))
    outputs, gradients = [], {}
    for step in range(3):
        optimizer.zero_grad()
        output = whole(**batch_of(step))
        output.loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
        optimizer.step()
        outputs.append(output.logits.detach())

    names = [f"party-{index}" for index in range(count)]
    config, placement = load_config(house.source, house.spec.task), house.placement(names)
    layers, agreement = expert_layer_names(config, house.spec.task), expert_agreement(house.spec, config)
    with Hub() as hub:
        session = hub.open_session(names, agreement, deadline_s=DEADLINE_S)
        for worker, name in zip(workers, names[1:], strict=True):
            worker.invite(
                Invitation(
                    spec=house.spec.to_json(),
                    address=hub.address,
                    session=session.id,
                    party=name,
                    parties=names,
                    ticket=session.tickets[name],
                    deadline_s=DEADLINE_S,
                )
            )
        loaded, channel = load_backbone(house.source, house.spec.task, seed=3)
        model, own = loaded.model.train(), placement.experts_of(names[0])
        module = load_experts(house.source, dict(zip(layers, own, strict=True)), house.spec.task)
        host = ExpertHost(module, layers, own, house.spec, deadline_s=60)
        noted = first_gradients(host)
        host.begin(names[:1], training=True)
        ticket = session.tickets[names[0]]
        link = connect(
            hub.address,
            session=session.id,
            party=names[0],
            ticket=ticket,
            agreement=agreement,
            deadline_s=DEADLINE_S,
        )
        with link:
            caller = ExpertCaller(link, host, placement, house.spec)
            own_optimizer = house.spec.optimizer.build(list(model.parameters()))
            with channel.joined(caller):
                for step in range(3):
                    own_optimizer.zero_grad()
                    output = model(**batch_of(step))
                    output.loss.backward()
                    assert torch.equal(output.logits, outputs[step])
                    if step == 0:
                        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                        assert [name for name in found if not torch.equal(found[name], gradients[name])] == []
                    own_optimizer.step()
                    caller.step(step=step, total_steps=0)
                caller.finish()
            caller.close()
        found_at = [(host.trained_state(), noted), *(worker.answer() for worker in workers)]
        session.close()
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    seen = set()
    for name, (trained, own_gradients) in zip(names, found_at, strict=True):
        for parameter, tensor in trained.items():
            layer = next(index for index, own in enumerate(layers) if parameter.startswith(f"{own}."))
            experts = list(placement.experts_of(name)[layer])
            assert torch.equal(torch.as_tensor(tensor), expected[parameter][experts]), (name, parameter)
            whole_gradient = gradients[parameter][experts]
            gradient = own_gradients.get(parameter, torch.zeros_like(whole_gradient))  # none, where no token came
            assert torch.equal(torch.as_tensor(gradient), whole_gradient), (name, parameter)
            seen.add(parameter)
    assert seen == gradients.keys() - found.keys()
