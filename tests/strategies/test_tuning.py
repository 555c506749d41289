"""Ways of tuning through Flower messages and sessions, and the whole model that comes out."""

import dataclasses

import pytest
import torch
from flwr.app import ConfigRecord
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from simulations.local_grid import LocalGrid
from tests.jobs import fedavg, job_nodes, job_spec, state_of
from tests.tiny import LABELS, tiny_rows
from tests.tiny_app import app
from vflair_flower.cli import app as vflair
from vflair_flower.partition import Segment, load_segment, make_trainable, resolve_model, trained_state
from vflair_flower.settings import LoraSettings, OptimizerSettings, TrainingSettings, WeightSettings
from vflair_flower.strategies import HubSettings, SplitLearning
from vflair_flower.tasks import BatchOrder, collate, encode

PARTIES = 3
TRAINING = TrainingSettings(rounds=2, local_steps=6, batch_size=4, max_tokens=16)


@pytest.fixture
def nodes(tmp_path):
    return job_nodes(tmp_path, PARTIES)


@pytest.fixture
def spec(tiny_bert):
    return job_spec(tiny_bert, training=TRAINING, averaging="step", seed=3)


def train(nodes, spec, *, num_rounds=None, **settings):
    strategy = SplitLearning(
        spec=spec, aggregator=fedavg(), hub=HubSettings(bind="inproc"), deadline_s=20.0, **settings
    )
    grid = LocalGrid(app, nodes)
    with strategy:
        strategy.start(grid, num_rounds=num_rounds)
        _, reports = strategy.evaluate(grid, config=ConfigRecord({"split": "test", "report-rows": True}))
    return strategy, reports


def test_clipped_portions_are_the_clipped_joined_batch(nodes, spec):
    """Three parties, portions of three rows of each batch of four, clipping over the whole model: centralised training.

    The tolerance is that of sums in another order (tests/e2e/test_processes.py), a few float32 roundings per step.
    """
    highest = 0.3
    sgd = OptimizerSettings(name="sgd", learning_rate=0.05, schedule="constant", max_grad_norm=highest)
    training = dataclasses.replace(TRAINING, micro_batch_size=3)
    spec = dataclasses.replace(spec, optimizer=sgd, training=training)
    strategy, _ = train(nodes, spec)
    source = resolve_model(spec.model)
    model = make_trainable(load_segment(source, Segment.whole(4), spec.task), spec.tuning, spec.task, seed=3).train()
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    encoded = [encode(tiny_rows(p).train, tokenizer, max_tokens=16) for p in range(PARTIES)]
    orders = [BatchOrder(num_rows=len(encoded[p]), batch_size=4, seed=3, party=f"party-{p}") for p in range(PARTIES)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, norms = sgd.build(parameters), []
    before = trained_state(model)
    for step in range(12):
        batch = collate([encoded[p][i] for p in range(PARTIES) for i in orders[p].indices(step)], pad_token_id=0)
        model(**batch.inputs).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, highest)))
        optimizer.step()
        optimizer.zero_grad()
    whole, split = trained_state(model), state_of(strategy)
    assert sum(norm > highest for norm in norms) >= 6  # clipping is what is compared
    assert max(float((whole[n] - before[n]).abs().max()) for n in whole) > 1e-3
    assert max(float((whole[n] - split[n]).abs().max()) for n in whole) < 4e-6


def test_adalora_goes_on_from_round_to_round_and_after_a_resume(nodes, spec, tmp_path):
    spec = dataclasses.replace(spec, tuning=LoraSettings(method="adalora", rank=2))
    whole, _ = train(nodes, spec, job="whole", checkpoint_dir=tmp_path / "whole")
    train(nodes, spec, num_rounds=1, job="broken", checkpoint_dir=tmp_path / "broken")
    resumed, _ = train(nodes, spec, job="broken", checkpoint_dir=tmp_path / "broken", resume=True)
    state = state_of(whole)
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(resumed).items())
    for part in (whole.arrays.to_torch_state_dict(), whole.body_state()):
        ranks = [int((tensor != 0).sum()) for name, tensor in part.items() if name.endswith(".lora_E")]
        assert sum(ranks) == 2 * len(ranks)


@pytest.mark.parametrize("body_at", ["strategy", "node"])
def test_halved_and_quantised_weights_cross_in_flower_messages(nodes, spec, tmp_path, body_at):
    weights = WeightSettings(dtype="bfloat16", quantization="int8")
    spec = dataclasses.replace(spec, weights=weights)
    if body_at == "node":
        nodes.append({"role": "model party", "state-dir": str(tmp_path / "state")})
    strategy, _ = train(nodes, spec, model_party=body_at)
    losses = [record.train_metrics["loss"] for record in strategy.history]
    assert losses[1] < losses[0]
    again, _ = train(nodes, spec, model_party=body_at, job="again")
    assert losses == [record.train_metrics["loss"] for record in again.history]


@pytest.mark.parametrize(
    ("method", "scope"),
    [(method, "full") for method in ("lora", "dora", "adalora", None)] + [(m, "local") for m in ("lora", "dora", None)],
)
def test_the_merged_model_is_the_split_one(nodes, spec, tmp_path, method, scope):
    tuning = None if method is None else LoraSettings(method=method, rank=2)
    spec = dataclasses.replace(spec, tuning=tuning, scope=scope)
    strategy, reports = train(nodes, spec)
    assert bool(strategy.body_state()) is (scope == "full")
    assert strategy.save_adapter(tmp_path / "adapter")
    done = CliRunner().invoke(vflair, ["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "whole")])
    assert done.exit_code == 0, done.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert model.config.id2label == dict(enumerate(LABELS))
    scores = {i: s for report in reports for i, s in zip(report.row_ids, report.scores, strict=True)}
    for party in range(PARTIES):
        rows = tiny_rows(party).test
        batch = tokenizer([row.text for row in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            said = model(**batch).logits.argmax(-1).tolist()
        assert [float(row.label == label) for row, label in zip(rows, said, strict=True)] == [
            scores[r.id] for r in rows
        ]
    base = AutoModelForSequenceClassification.from_pretrained(spec.model, num_labels=len(LABELS))
    changed = [n for n, p in base.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    in_body = [name for name in changed if ".layer.1." in name or ".layer.2." in name]
    assert changed
    assert bool(in_body) is (scope == "full")


def test_merging_loses_nothing_and_says_what_is_missing(nodes, spec, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    for folder, out, message in (
        (tmp_path, tmp_path / "full", "is not empty"),
        (tmp_path, tmp_path / "new", "is not what a run left of its training"),
    ):
        done = CliRunner().invoke(vflair, ["merge", str(folder), "--out", str(out)])
        assert done.exit_code == 1
        assert message in " ".join(done.output.split())
