"""The generate message: parties write for prompts that only they hold, and the strategy learns numbers."""

import dataclasses
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Message
from peft import PeftModel
from transformers import AutoModelForCausalLM

from simulations.local_grid import LocalGrid, ProcessGrid
from tests.jobs import fedavg, job_nodes
from tests.writers import BLOCKS, app, prompts_of, save_writer
from vflair_flower.errors import ConfigurationError, PartyLostError
from vflair_flower.generation import write_texts
from vflair_flower.partition import PartitionPlan, Segment, load_segment, load_tokenizer, resolve_model
from vflair_flower.settings import (
    DecodingSettings,
    GenerationSettings,
    LoraSettings,
    OptimizerSettings,
    TaskKind,
    TaskSettings,
    TrainingSettings,
)
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import HubSettings, SplitLearning

GREEDY = DecodingSettings(max_new_tokens=9)
WAYS = {
    "greedy": GREEDY,
    "sampling": DecodingSettings(max_new_tokens=9, do_sample=True, temperature=0.7, top_p=0.9, top_k=0, seed=3),
    "several": DecodingSettings(max_new_tokens=6, do_sample=True, num_return_sequences=3, seed=4),
    "beam": DecodingSettings(max_new_tokens=9, num_beams=3, num_return_sequences=2),
}


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_writer(tmp_path_factory.mktemp("writer")))


@pytest.fixture
def spec(writer: str) -> SplitSpec:
    return SplitSpec(
        model=writer,
        plan=PartitionPlan(head_blocks=1, tail_blocks=1),
        task=TaskSettings(kind=TaskKind.CAUSAL_LM),
        tuning=LoraSettings(rank=2),
        optimizer=OptimizerSettings(learning_rate=0.05),
        training=TrainingSettings(rounds=1, local_steps=4, batch_size=4, max_tokens=16),
        generation=GenerationSettings(max_rows=7, max_length=32),
    )


@pytest.fixture
def nodes(tmp_path: Path) -> list[dict]:
    return job_nodes(tmp_path, 2, out=str(tmp_path))


def strategy_for(spec: SplitSpec, **settings: object) -> SplitLearning:
    return SplitLearning(
        spec=spec, aggregator=fedavg(), deadline_s=20, **{"hub": HubSettings(bind="inproc"), **settings}
    )


def expected(spec: SplitSpec, decoding: DecodingSettings, index: int, adapter: Path | None = None, marker: str = ""):
    """What the whole model writes for a party's prompts."""
    source = resolve_model(spec.model)
    if adapter is None:
        model = load_segment(source, Segment.whole(BLOCKS), spec.task).model.eval()
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(spec.model), str(adapter)).eval()
    texts = write_texts(model, load_tokenizer(source), prompts_of(index, marker), decoding, spec.generation)
    return [list(each) for each in texts.texts]


def read(folder: Path, index: int) -> dict:
    return json.loads((folder / f"{index}.json").read_text())


@pytest.mark.parametrize("decoding", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("plan", [PartitionPlan(), PartitionPlan(mode="HT", tail_blocks=0)], ids=["HBT", "HT"])
def test_parties_write_what_the_whole_model_writes(
    spec: SplitSpec, nodes: list[dict], tmp_path: Path, plan: PartitionPlan, decoding: DecodingSettings
) -> None:
    spec = dataclasses.replace(spec, plan=plan)
    if decoding.do_sample:
        nodes = nodes[:1]  # parties that are threads of one process draw from one generator
    with strategy_for(spec) as strategy:
        counts = strategy.generate(LocalGrid(app, nodes), decoding)
    assert len(counts) == len(nodes)
    for index, one in enumerate(counts):
        written = read(tmp_path, index)
        assert written["prompts"] == list(prompts_of(index))
        assert written["texts"] == expected(spec, decoding, index)
        assert (one.party, one.prompts) == (f"party-{index}", len(prompts_of(index)))
        assert one.texts == one.prompts * decoding.num_return_sequences
        assert 0 < one.new_tokens <= one.texts * decoding.max_new_tokens
        assert one.sent_bytes > 0
        assert one.seconds > 0


@pytest.mark.parametrize("holder", ["strategy", "node"])
def test_what_was_trained_is_used_wherever_the_body_is(
    spec: SplitSpec, nodes: list[dict], tmp_path: Path, holder: str
) -> None:
    extra = [{"role": "model party", "state-dir": str(tmp_path / "model")}] if holder == "node" else []
    grid = LocalGrid(app, [*nodes, *extra])
    with strategy_for(spec, model_party=holder, job=holder) as strategy:
        strategy.start(grid)
        counts = strategy.generate(grid, GREEDY)
        assert strategy.save_adapter(tmp_path / "adapter")
    assert [one.party for one in counts] == ["party-0", "party-1"]
    for index in range(2):
        assert read(tmp_path, index)["texts"] == expected(spec, GREEDY, index, tmp_path / "adapter")
        assert read(tmp_path, index)["texts"] != expected(spec, GREEDY, index)


def test_no_text_reaches_the_strategy(spec: SplitSpec, nodes: list[dict], tmp_path: Path) -> None:
    seen: list[Message] = []
    nodes = [{**node, "marker": "parcel"} for node in nodes]

    class Watched(LocalGrid):
        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            seen.extend(replies)
            return replies

    with strategy_for(spec) as strategy:
        strategy.generate(Watched(app, nodes), GREEDY)
        ledger = strategy.ledger
    replies = [m for m in seen if "metrics" in m.content]
    assert len(replies) == 2
    for reply in replies:
        assert reply.content.array_records == {}
        assert set(reply.content["metrics"]) == {"num-examples", "texts", "prompt-tokens", "new-tokens", "seconds"}
        words = {word for each in read(tmp_path, 0)["texts"] for text in each for word in text.split()} | {"parcel"}
        said = str(dict(reply.content.config_records))
        assert [word for word in words if f" {word} " in said or f'"{word}' in said] == []
    assert {e.tensor for e in ledger.entries()} == {"header", "hidden", "attention_mask"}


def test_a_party_without_prompts_says_so_and_the_others_write(
    spec: SplitSpec, nodes: list[dict], tmp_path: Path
) -> None:
    nodes[0]["silent"] = 1
    with strategy_for(spec) as strategy:
        assert [one.party for one in strategy.generate(LocalGrid(app, nodes), GREEDY)] == ["party-1"]
    with (
        strategy_for(spec, on_party_lost="stop") as strategy,
        pytest.raises(PartyLostError, match=r"party 'party-0'.*DataParty\(generation=TextGeneration"),
    ):
        strategy.generate(LocalGrid(app, nodes), GREEDY)


@pytest.mark.parametrize("way", ["the sink fails", "a prompt is too long"])
def test_a_party_that_fails_is_named(spec: SplitSpec, nodes: list[dict], way: str) -> None:
    decoding, said = GREEDY, "the disk is full"
    if way == "the sink fails":
        nodes[0]["break"] = nodes[1]["break"] = 1
    else:
        decoding = DecodingSettings(max_new_tokens=31)
        said = r"prompt \d has \d+ tokens; with max_new_tokens 31 it would pass the 32"
    with strategy_for(spec) as strategy, pytest.raises(PartyLostError, match=said):
        strategy.generate(LocalGrid(app, nodes), decoding)


@pytest.mark.parametrize(
    ("change", "decoding", "said"),
    [
        ({"task": TaskSettings(label_names=("a", "b"))}, GREEDY, "'sequence-classification', which writes no texts"),
        ({}, DecodingSettings(num_beams=8), "a prompt takes 8 rows.*agreed on 7 at once"),
        ({}, DecodingSettings(max_new_tokens=32), "max_new_tokens is 32, and the parties agreed on rows of 32"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anyone_is_asked(
    spec: SplitSpec, nodes: list[dict], change: dict, decoding: DecodingSettings, said: str
) -> None:
    with strategy_for(dataclasses.replace(spec, **change)) as strategy, pytest.raises(ConfigurationError, match=said):
        strategy.generate(LocalGrid(app, nodes), decoding)
    assert strategy.cards == {}


def test_resumed_job_writes_without_training(
    spec: SplitSpec, nodes: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = LocalGrid(app, nodes)
    with strategy_for(spec, checkpoint_dir=tmp_path / "run") as strategy:
        strategy.start(grid)
        strategy.save_adapter(tmp_path / "adapter")
    with strategy_for(spec, checkpoint_dir=tmp_path / "run", resume=True) as strategy:
        strategy.generate(LocalGrid(app, nodes), GREEDY)
    assert read(tmp_path, 0)["texts"] == expected(spec, GREEDY, 0, tmp_path / "adapter")


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[[list[dict]], ProcessGrid]]:
    grids: list[ProcessGrid] = []

    def make(nodes: list[dict]) -> ProcessGrid:
        grids.append(ProcessGrid("tests.writers", nodes))
        return grids[-1]

    yield make
    for grid in grids:
        grid.close()


@pytest.mark.timeout(180)
def test_between_processes_two_parties_and_a_model_party(
    spec: SplitSpec, nodes: list[dict], tmp_path: Path, processes: Callable[[list[dict]], ProcessGrid]
) -> None:
    marker = "q" + secrets.token_hex(6)
    model_node = {"role": "model party", "state-dir": str(tmp_path / "model")}
    grid = processes([*({**node, "marker": marker} for node in nodes), model_node])
    with strategy_for(spec, model_party="node", hub=HubSettings()) as strategy:
        counts = strategy.generate(grid, WAYS["sampling"])
        entries = strategy.ledger.entries()
    for index, one in enumerate(counts):
        assert read(tmp_path, index)["texts"] == expected(spec, WAYS["sampling"], index, marker=marker)
        hidden = [e for e in entries if (e.party, e.tensor) == (one.party, "hidden")]
        assert {e.direction for e in hidden} == {"up", "down"}
        assert len({e.bytes for e in hidden}) == 1
