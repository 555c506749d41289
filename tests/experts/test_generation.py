"""Parties whose model has its experts at all of them write what the whole model writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from simulations.local_grid import LocalGrid, ProcessGrid
from tests.experts.conftest import save_writing_moe
from tests.experts.test_export import PARTIES, job, nodes_at, own_weights, spec_of
from tests.experts.writing_app import app
from tests.writers import prompts_of
from vflair_flower.errors import PartyLostError
from vflair_flower.generation import write_texts
from vflair_flower.settings import DecodingSettings, ExpertSettings, GenerationSettings
from vflair_flower.strategies import HubSettings

WAYS = {
    "greedy": DecodingSettings(max_new_tokens=9),
    "sampling": DecodingSettings(max_new_tokens=9, do_sample=True, temperature=0.7, top_p=0.9, top_k=0, seed=3),
    "beam": DecodingSettings(max_new_tokens=7, num_beams=3, num_return_sequences=2),
}
BOUNDS = GenerationSettings(max_rows=7, max_length=32)


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def get(family: str) -> str:
        if family not in made:
            made[family] = str(save_writing_moe(tmp_path_factory.mktemp("moe"), family))
        return made[family]

    return get


def whole_writes(folder: Path | str, index: int, decoding: DecodingSettings) -> list[list[str]]:
    model = own_weights(AutoModelForCausalLM.from_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [list(each) for each in write_texts(model, tokenizer, prompts_of(index), decoding, BOUNDS).texts]


def written(folder: Path, index: int) -> list[list[str]]:
    texts: list[list[str]] = json.loads((folder / f"{index}.json").read_text())["texts"]
    return texts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_parties_write_what_the_whole_model_writes(
    writers: Callable[[str], str], tmp_path: Path, family: str, way: str
) -> None:
    """Two parties have prompts, of different number and length, and two only host; one draws where tokens are drawn.

    Parties that are threads of one process draw from one generator.
    """
    asking = [1] if WAYS[way].do_sample else [0, 1]
    nodes = nodes_at(tmp_path)
    for index in range(PARTIES):
        nodes[index] |= {} if index in asking else {"mute": 1}
    with job(spec_of(writers(family), generation=BOUNDS)) as strategy:
        counts = strategy.generate(LocalGrid(app, nodes), WAYS[way])
        crossed = {e.tensor for e in strategy.ledger.entries()}
    assert [one.prompts for one in counts] == [len(prompts_of(i)) if i in asking else 0 for i in range(PARTIES)]
    assert all(one.sent_bytes > 0 for one in counts)
    assert crossed == {"header", "hidden", "row", "expert", "output"}
    for index in range(PARTIES):
        assert (tmp_path / f"{index}.json").exists() is (index in asking)
    for index in asking:
        texts = written(tmp_path, index)
        assert texts == whole_writes(writers(family), index, WAYS[way])
        assert len({text for each in texts for text in each}) > 1


@pytest.mark.slow
def test_what_was_trained_is_written_with_and_exported(writers: Callable[[str], str], tmp_path: Path) -> None:
    grid = LocalGrid(app, nodes_at(tmp_path, **{"shares-model": 1}))
    with job(spec_of(writers("mixtral"), generation=BOUNDS)) as strategy:
        strategy.start(grid)
        strategy.generate(grid, WAYS["greedy"])
        for index in range(2):
            strategy.export(grid, tmp_path / f"out-{index}", model_of=f"party-{index}")
    for index in range(2):
        texts = written(tmp_path, index)
        assert texts == whole_writes(tmp_path / f"out-{index}", index, WAYS["greedy"])
        assert texts != whole_writes(writers("mixtral"), index, WAYS["greedy"])


@pytest.mark.parametrize("on_host_lost", ["fail", "skip"])
def test_a_host_that_goes_while_others_write(
    writers: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_host_lost: str
) -> None:
    """A party breaks off before it writes; the others end as configured, and it is named."""
    from vflair_flower.clients import generation

    write = generation.write_texts

    def leave(model: Any, tokenizer: Any, prompts: Any, *more: Any) -> Any:
        if tuple(prompts) == prompts_of(1):
            raise RuntimeError("power cut")
        return write(model, tokenizer, prompts, *more)

    monkeypatch.setattr(generation, "write_texts", leave)
    experts = ExpertSettings(on_host_lost=on_host_lost, k_min=0 if on_host_lost == "skip" else 1)
    with job(spec_of(writers("mixtral"), generation=BOUNDS, experts=experts)) as strategy:
        grid = LocalGrid(app, nodes_at(tmp_path))
        if on_host_lost == "fail":
            with pytest.raises(PartyLostError, match="party-1"):
                strategy.generate(grid, WAYS["greedy"])
            return
        assert [one.party for one in strategy.generate(grid, WAYS["greedy"])] == ["party-0", "party-2", "party-3"]
    assert not (tmp_path / "1.json").exists()


@pytest.mark.timeout(180)
@pytest.mark.slow
def test_between_processes_all_parties_draw(writers: Callable[[str], str], tmp_path: Path) -> None:
    grid = ProcessGrid("tests.experts.writing_app", nodes_at(tmp_path))
    try:
        with job(spec_of(writers("mixtral"), generation=BOUNDS), hub=HubSettings()) as strategy:
            strategy.generate(grid, WAYS["sampling"])
    finally:
        grid.close()
    for index in range(PARTIES):
        assert written(tmp_path, index) == whole_writes(writers("mixtral"), index, WAYS["sampling"])
