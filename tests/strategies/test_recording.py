"""Real jobs that are recorded: what adversaries saw is what the head makes of the truth that parties wrote down."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from simulations.local_grid import LocalGrid
from tests.experts.conftest import save_writing_moe
from tests.jobs import fedavg
from tests.tiny import LABELS, tiny_rows
from tests.writers import _rows as writers_rows
from tests.writers import prompts_of, save_writer
from vflair_flower.attacks import SplitView, Surrogate, split_view
from vflair_flower.attacks.truth_log import read_truth
from vflair_flower.clients import DataParty, ExpertParty, ModelParty, PartyRows, TextGeneration
from vflair_flower.clients.recording import Record
from vflair_flower.control import GENERATE, HELLO, SERVE
from vflair_flower.errors import DataError, PartyLostError
from vflair_flower.partition import PartitionPlan, load_tokenizer, resolve_model
from vflair_flower.remote.truth import read_truth_log
from vflair_flower.session import Recorded, RecordingSettings, read_recording
from vflair_flower.session.header import Kind
from vflair_flower.settings import (
    DecodingSettings,
    ExpertSettings,
    GenerationSettings,
    LoraSettings,
    OptimizerSettings,
    TaskKind,
    TaskSettings,
    TrainingSettings,
)
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import CollaborativeMoE, HubSettings, SplitLearning
from vflair_flower.tasks import encode_task

BLOCKS, PARTIES = 4, 2
ALMOST = 2e-4
"""What a learning rate of 1e-7 moves smashed data by, at most; other texts' are further away by far."""
SLOW = OptimizerSettings(learning_rate=1e-7, schedule="constant")


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_writer(tmp_path_factory.mktemp("writer")))


@pytest.fixture
def spec(writer: str) -> SplitSpec:
    return SplitSpec(
        model=writer,
        plan=PartitionPlan(head_blocks=1, tail_blocks=1),
        task=TaskSettings(kind=TaskKind.CAUSAL_LM),
        tuning=LoraSettings(rank=2, dropout=0.0),
        optimizer=SLOW,
        training=TrainingSettings(rounds=2, local_steps=3, batch_size=3, max_tokens=16),
        generation=GenerationSettings(max_rows=7, max_length=32),
    )


def app_of(
    folder: Path, record: Record, rows: Callable[[Context], PartyRows] = writers_rows, *, at_node: Record = None
) -> ClientApp:
    """Data parties that write their truth, and a model party that records at its own node."""
    generation = TextGeneration(
        prompts=lambda context: prompts_of(int(context.node_config["partition-id"])),
        on_text=lambda context, prompts, texts: None,
    )
    data_party = DataParty(rows, state_dir=folder, generation=generation, threads=1, record=record)
    model_party = ModelParty(state_dir=folder / "model", record=at_node)
    app = ClientApp()
    app.train()(data_party.train)
    app.evaluate()(data_party.evaluate)
    app.query(GENERATE)(data_party.generate)
    app.train(SERVE)(model_party.serve)

    @app.query(HELLO)
    def hello(message: Message, context: Context) -> Message:
        return (model_party if "role" in context.node_config else data_party).hello(message, context)

    return app


def nodes(count: int = PARTIES) -> list[dict]:
    return [{"partition-id": i, "num-partitions": count} for i in range(count)]


def strategy_for(spec: SplitSpec, record: RecordingSettings | None, **more: object) -> SplitLearning:
    return SplitLearning(
        spec=spec, aggregator=fedavg(), deadline_s=20, hub=HubSettings(bind="inproc"), record=record, **more
    )


def truth_folders(record: RecordingSettings) -> list[Path]:
    return [record.folder / "job" / "truth" / f"party-{i}" for i in range(PARTIES)]


def seen_by(record: RecordingSettings, adversary: str = "model-party", *, party: str | None = None) -> list[Recorded]:
    return list(read_recording(record.folder_of("job", adversary, party=party)))


def view_of(spec: SplitSpec, kept: Sequence[Recorded]) -> SplitView:
    return split_view(kept, plan=spec.plan, num_blocks=BLOCKS, task=spec.task)


def assert_head_of_truth_is_what_was_seen(spec: SplitSpec, kept: Sequence[Recorded], record: RecordingSettings) -> None:
    """And of the next row's truth it is not."""
    tokenizer = load_tokenizer(resolve_model(spec.model))
    view, truth = view_of(spec, kept), read_truth(truth_folders(record), kept, tokenizer)
    assert len(truth.ids) == view.rows == len(truth.row_ids)
    surrogate = Surrogate(resolve_model(spec.model), spec.plan, spec.task, seed=spec.seed)
    smashed = [
        hidden_TD[mask_T.bool()]
        for one in view.exchanges
        for hidden_TD, mask_T in zip(one.hidden_BTD, one.attention_mask_BT, strict=True)
    ]
    for ids, hidden_TD in zip(truth.ids, smashed, strict=True):
        assert len(ids) == len(hidden_TD)
        assert torch.allclose(surrogate.head_of_ids(ids[None])[0], hidden_TD, atol=ALMOST)
    moved = [(ids, h) for ids, h in zip(truth.ids[1:], smashed, strict=False) if len(ids) == len(h)]
    wrong = [(ids, h) for ids, h in moved if not torch.allclose(surrogate.head_of_ids(ids[None])[0], h, atol=0.1)]
    assert len(moved) >= len(wrong) > 0


def test_training_and_evaluation_line_up_with_the_truth(tmp_path: Path, spec: SplitSpec) -> None:
    record = RecordingSettings(folder=tmp_path / "kept", adversaries=("model-party", "network"))
    with strategy_for(spec, record) as strategy:
        strategy.start(LocalGrid(app_of(tmp_path / "state", record), nodes()))
    kept = seen_by(record)
    assert {(s.server_round, s.training) for s in kept} == {(r, t) for r in (1, 2) for t in (True, False)}
    assert_head_of_truth_is_what_was_seen(spec, kept, record)
    trained = view_of(spec, [s for s in kept if s.training])
    assert len(trained.exchanges) == 2 * PARTIES * spec.training.local_steps
    for one in trained.exchanges:
        assert one.answer.shape == one.hidden_BTD.shape == one.answer_grad.shape == one.hidden_grad_BTD.shape
    tokenizer = load_tokenizer(resolve_model(spec.model))
    truth = read_truth(truth_folders(record), [s for s in kept if s.training], tokenizer)
    rows = [
        row for i in range(PARTIES) for row in writers_rows(Context(1, 1, {"partition-id": i}, RecordDict(), {})).train
    ]
    assert set(truth.row_ids) == {row.id for row in rows}
    by_id = {row.row_id: row.input_ids for row in encode_task(spec.task.kind, rows, tokenizer, max_tokens=16)}
    for row_id, ids in zip(truth.row_ids, truth.ids, strict=True):
        assert tuple(ids.tolist()) == tuple(by_id[row_id])
    counted = [entry for entry in strategy.ledger.entries() if entry.operation != "notice"]
    for index in range(PARTIES):
        party = f"party-{index}"
        crossed = sum(entry.bytes for entry in counted if entry.party == party)
        for own in (None, party):  # as the hub saw it, and as the party itself did
            frames = [one for one in seen_by(record, "network", party=own) if one.kind is not Kind.NOTICE]
            assert sum(one.num_bytes for one in frames if one.party == party) == crossed


@pytest.mark.parametrize(
    "decoding",
    [
        DecodingSettings(max_new_tokens=6),
        DecodingSettings(max_new_tokens=6, num_beams=3, num_return_sequences=2),
    ],
    ids=["greedy", "beam"],
)
@pytest.mark.parametrize("tuning", [LoraSettings(rank=2, dropout=0.0), None], ids=["lora", "full"])
def test_every_step_of_writing_lines_up_with_the_truth(
    tmp_path: Path, spec: SplitSpec, decoding: DecodingSettings, tuning: LoraSettings | None
) -> None:
    spec = dataclasses.replace(spec, tuning=tuning)
    record = RecordingSettings(folder=tmp_path / "kept", adversaries=("model-party",))
    with strategy_for(spec, record) as strategy:
        strategy.generate(LocalGrid(app_of(tmp_path / "state", record), nodes()), decoding)
    kept = seen_by(record)
    assert_head_of_truth_is_what_was_seen(spec, kept, record)
    for one in view_of(spec, kept).exchanges:
        assert one.hidden_BTD.shape[1] > one.prompt_tokens
    steps = [s for s in kept if "cache" in s.meta]
    assert {s.meta["cached"] > 0 for s in steps} == {True, False}


def test_classes_and_a_sample_line_up_with_the_truth(tmp_path: Path, tiny_bert: str) -> None:
    """Head-Tail: logits are seen; every third pass; labels are in the truth alone."""

    def rows(context: Context):
        return tiny_rows(int(context.node_config["partition-id"]))

    spec = SplitSpec(
        model=tiny_bert,
        plan=PartitionPlan(mode="HT", head_blocks=1, tail_blocks=0),
        task=TaskSettings(label_names=LABELS),
        tuning=None,
        optimizer=SLOW,
        training=TrainingSettings(rounds=1, local_steps=7, batch_size=4, max_tokens=16),
    )
    record = RecordingSettings(folder=tmp_path / "kept", adversaries=("model-party",), every=3)
    with strategy_for(spec, record) as strategy:
        strategy.start(LocalGrid(app_of(tmp_path / "state", record, rows), nodes()))
    kept = [s for s in seen_by(record) if s.training]
    assert_head_of_truth_is_what_was_seen(spec, kept, record)
    view = view_of(spec, kept)
    assert [one.answer.shape for one in view.exchanges] == [(4, len(LABELS))] * PARTIES * 3  # steps 0, 3, 6
    truth = read_truth(truth_folders(record), kept, load_tokenizer(resolve_model(spec.model)))
    true = {row.id: row.label for i in range(PARTIES) for row in tiny_rows(i).train}
    assert truth.labels.tolist() == [true[row_id] for row_id in truth.row_ids]
    fewer = read_truth(truth_folders(record), kept, truth.tokenizer, limit=2)
    assert fewer.row_ids == truth.row_ids[:8]
    with pytest.raises(DataError, match="have their truth in the folders given"):
        read_truth(truth_folders(record)[:1], kept, truth.tokenizer)
    with pytest.raises(DataError, match="no vflair-truth"):
        read_truth([record.folder_of("job", "model-party")], kept, truth.tokenizer)


def test_a_model_party_records_at_its_own_node(tmp_path: Path, spec: SplitSpec) -> None:
    at_hub, at_node = (
        RecordingSettings(folder=tmp_path / name, adversaries=("model-party",)) for name in ("hub", "node")
    )
    app = app_of(tmp_path / "state", at_hub, at_node=lambda context: at_node)
    with strategy_for(spec, at_hub, model_party="node") as strategy:
        strategy.start(LocalGrid(app, [*nodes(), {"role": "model party"}]), num_rounds=1)
    one, other = seen_by(at_hub), seen_by(at_node, party="model-party")
    assert len(one) == len(other) > 0
    ways = [sorted((s.session, s.call_id, s.kind, s.direction) for s in kept) for kept in (one, other)]
    assert ways[0] == ways[1]  # several parties' frames may pass the two in another order
    assert_head_of_truth_is_what_was_seen(spec, other, at_hub)


def test_a_model_party_that_would_record_nothing_is_refused(tmp_path: Path, spec: SplitSpec) -> None:
    app = app_of(tmp_path, None, at_node=RecordingSettings(folder=tmp_path, adversaries=("hub",)))
    strategy = strategy_for(spec, None, model_party="node")
    with strategy, pytest.raises(PartyLostError, match="sees what none of them sees"):
        strategy.start(LocalGrid(app, [*nodes(), {"role": "model party"}]), num_rounds=1)


class TestExperts:
    """Parties that host each other's experts."""

    COUNT = 3

    @pytest.fixture(scope="class")
    def moe(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return str(save_writing_moe(tmp_path_factory.mktemp("moe"), "mixtral"))

    @pytest.mark.parametrize("backbone", ["party", "split"])
    def test_a_host_has_the_tokens_that_were_routed_to_it(self, tmp_path: Path, moe: str, backbone: str) -> None:
        spec = SplitSpec(
            model=moe,
            plan=PartitionPlan(head_blocks=1, tail_blocks=0) if backbone == "split" else PartitionPlan(),
            task=TaskSettings(kind=TaskKind.CAUSAL_LM),
            tuning=None,
            optimizer=SLOW,
            training=TrainingSettings(rounds=1, local_steps=2, batch_size=3, max_tokens=16),
            experts=ExpertSettings(backbone=backbone),
            averaging="none",
        )
        record = RecordingSettings(folder=tmp_path / "hub", adversaries=("host:party-1", "hub"))
        at_home = dataclasses.replace(record, folder=tmp_path / "home")
        app = ClientApp()
        ExpertParty(writers_rows, state_dir=tmp_path / "state", threads=1, record=at_home).register(app)
        everyone = FedAvg(min_train_nodes=self.COUNT, min_evaluate_nodes=self.COUNT, min_available_nodes=self.COUNT)
        with CollaborativeMoE(
            spec=spec,
            aggregator=everyone,
            parties=self.COUNT,
            deadline_s=20,
            hub=HubSettings(bind="inproc"),
            record=record,
        ) as strategy:
            strategy.start(LocalGrid(app, nodes(self.COUNT)))
        kept, own = seen_by(record, "host:party-1"), seen_by(at_home, "host:party-1", party="party-1")
        assert len(kept) == len(own) > 0
        asked = {
            (seen.session, seen.source, seen.target, seen.meta["call"]): seen.tensors["hidden"]
            for seen in seen_by(record, "hub")
            if seen.kind is Kind.CALL and seen.operation == "forward" and seen.meta["layer"] == 0
        }
        assert {to for _, _, to, _ in asked} == {by for _, by, _, _ in asked} == {f"party-{i}" for i in range(3)}
        vectors: dict[int, list[Tensor]] = {}
        for index in range(self.COUNT):
            for call in read_truth_log(at_home.folder / "job" / "truth" / f"party-{index}"):
                if call.layer == 0:
                    number = int(call.name.removeprefix("call:"))
                    vectors_UD = asked.pop((call.session, call.party, call.target, number))
                    for token, vector_D in zip(call.ids.tolist(), vectors_UD, strict=True):
                        vectors.setdefault(token, []).append(vector_D)
        assert not asked
        # Every text begins with one token, which attends to itself alone: one vector, and no other token's.
        first = vectors.pop(int(load_tokenizer(resolve_model(moe)).cls_token_id))
        assert len(first) > 3
        assert all(torch.allclose(one, first[0], atol=ALMOST) for one in first)
        assert not any(torch.allclose(one, first[0], atol=0.01) for other in vectors.values() for one in other)
