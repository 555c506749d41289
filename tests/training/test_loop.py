"""The training loop: portions of a step add up to the step, and evaluation is told row by row."""

import gc
import weakref

import pytest
import torch

from tests.tiny import LABELS, tiny_rows
from vflair_flower.memory import ActivationMeter, count_kept
from vflair_flower.partition import Segment, load_segment, load_tokenizer, make_trainable, resolve_model
from vflair_flower.settings import LoraSettings, OptimizerSettings, TaskSettings
from vflair_flower.tasks import BatchOrder, encode
from vflair_flower.training import evaluate, train_steps

TASK = TaskSettings(label_names=LABELS)
SGD = OptimizerSettings(name="sgd", learning_rate=0.1, schedule="constant")


@pytest.fixture
def setting(tiny_bert):
    source = resolve_model(tiny_bert)
    segment = Segment(blocks=(0, 1, 2, 3), num_blocks=4, embedding=True, task_head=True)
    model = make_trainable(load_segment(source, segment, TASK), LoraSettings(), TASK, seed=0).train()
    return model, encode(tiny_rows(0).train, load_tokenizer(source), max_tokens=16)


def train(setting, micro_batch_size=None, steps=3):
    model, encoded = setting
    trained = train_steps(
        model,
        encoded,
        kind=TASK.kind,
        steps=range(steps),
        total_steps=steps,
        order=BatchOrder(num_rows=len(encoded), batch_size=10, seed=0, party="a"),
        optimizer=SGD.build([p for p in model.parameters() if p.requires_grad]),
        settings=SGD,
        pad_token_id=0,
        seed=0,
        name="a",
        meter=ActivationMeter(model),
        micro_batch_size=micro_batch_size,
    )
    return trained, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_portions_of_a_step_add_up_to_the_step(setting, tiny_bert, request):
    start = {n: p.detach().clone() for n, p in setting[0].named_parameters()}
    whole, one = train(setting)
    with torch.no_grad():
        for name, parameter in setting[0].named_parameters():
            parameter.copy_(start[name])
    portions, other = train(setting, micro_batch_size=4)
    assert portions.rows == whole.rows == 24
    assert portions.loss == pytest.approx(whole.loss, rel=1e-6)
    assert max(float((one[n] - start[n]).abs().max()) for n in one) > 1e-3
    assert max(float((one[n] - other[n]).abs().max()) for n in one) < 1e-6


def test_evaluation_does_not_depend_on_how_rows_are_batched(setting):
    model, encoded = setting
    train(setting)
    rows = tiny_rows(0).train
    results = [
        evaluate(model, encoded, kind=TASK.kind, rows=rows, batch_size=size, pad_token_id=0) for size in (1, 5, 24)
    ]
    assert len({result.scores for result in results}) == 1
    assert results[0].score == sum(results[0].scores) / 24
    assert results[0].row_ids == tuple(row.id for row in rows)
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)


def test_a_graph_that_was_measured_and_is_not_differentiated_is_freed():
    class Mark:
        """Stands for what hooks hold, such as rows' gradients under DP-SGD."""

    mark = Mark()
    gone = weakref.ref(mark)
    weight = torch.randn(3, 4, requires_grad=True)
    with count_kept((weight,)) as kept_bytes:
        out = torch.softmax(weight * 2, -1)  # keeps its own output
    out.register_hook(lambda grad, held=mark: grad)
    assert kept_bytes() == out.numel() * out.element_size()
    del out, mark
    gc.collect()
    assert gone() is None


def test_what_was_measured_has_the_same_gradients():
    weight = torch.randn(3, 4, requires_grad=True)
    with count_kept(()):
        measured = torch.softmax(weight * 2, -1).square().sum()
    (first,) = torch.autograd.grad(measured, weight, create_graph=True)
    (expected,) = torch.autograd.grad(torch.softmax(weight * 2, -1).square().sum(), weight, create_graph=True)
    assert torch.equal(first, expected)
    (second,), (other,) = (torch.autograd.grad(one.square().sum(), weight) for one in (first, expected))
    torch.testing.assert_close(second, other)
