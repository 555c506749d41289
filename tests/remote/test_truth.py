"""What a data party writes down about its own calls: the tokens behind them, whatever the model's family."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from vflair_flower.certificate import TINY
from vflair_flower.certificate.compare import make_inputs
from vflair_flower.certificate.parties import Parties, checkpoint, open_parties, plan_of
from vflair_flower.errors import DataError
from vflair_flower.partition import Mode, PartitionPlan
from vflair_flower.remote.truth import TrueCall, TruthRecorder, read_truth_log
from vflair_flower.session import RecordingSettings, Sighting
from vflair_flower.settings import TaskKind
from vflair_flower.tasks import EncodedRow

CLASSES, WRITES, SUMMARISES = TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.CAUSAL_LM, TaskKind.SEQ2SEQ_LM
FAMILIES = {
    "albert": CLASSES,
    "bert": TaskKind.MASKED_LM,
    "gemma3": WRITES,
    "gpt2": WRITES,
    "llama-tied": WRITES,
    "mamba": WRITES,
    "roberta": CLASSES,
    "t5": SUMMARISES,
    "t5-gated": SUMMARISES,
    "xlnet": CLASSES,
}


@contextmanager
def written_down(parties: Parties, folder: Path, **more: int) -> Iterator[tuple[TruthRecorder, list[Sighting]]]:
    """Write down the truth of the data party's calls, and keep what leaves."""
    settings = RecordingSettings(folder=folder, **more)  # type: ignore[arg-type]
    truth = TruthRecorder(settings, job="job", party="ann", server_round=3, training=True)
    sent: list[Sighting] = []

    def tap(seen: Sighting) -> None:
        truth(seen)
        if "hidden" in seen.tensors and seen.direction == "up":
            sent.append(seen)

    link = parties.remote._link
    link._tap = tap  # type: ignore[attr-defined] # as `connect(tap=...)`, which this harness does not call itself
    with truth.watching(parties.data_party):
        yield truth, sent
    truth.close()


def log_of(folder: Path) -> list[TrueCall]:
    return list(read_truth_log(folder / "job" / "truth" / "ann"))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_behind_the_vectors_that_left(tmp_path: Path, family: str) -> None:
    kind = FAMILIES[family]
    with (
        checkpoint(TINY[family](), kind) as source,
        open_parties(source, kind, plan_of(Mode.HBT)) as parties,
        written_down(parties, tmp_path) as (_, sent),
    ):
        for seed in range(2):
            parties.data_party(**make_inputs(parties.whole.config, kind, seed=seed)).loss.backward()
    calls = log_of(tmp_path)
    assert len(calls) == len(sent) == (4 if kind is SUMMARISES else 2)
    for call, seen in zip(calls, sent, strict=True):
        inputs = make_inputs(parties.whole.config, kind, seed=calls.index(call) * 2 // len(calls))
        if seen.meta.get("part") == "decoder":
            began = torch.full((3, 1), parties.whole.config.decoder_start_token_id)
            expected = torch.cat([began, inputs["labels"][:, :-1].clamp(min=0)], dim=1)
        else:
            expected = inputs["input_ids"]
            assert torch.equal(call.mask_BT, inputs["attention_mask"])
        assert torch.equal(call.ids, expected)
        assert torch.equal(call.labels, inputs["labels"])
        assert call.name == f"call:{seen.meta['call']}"
        assert (call.party, call.session, call.target) == (seen.party, seen.session, seen.target)
        assert (call.server_round, call.training) == (3, True)


def test_an_encoders_and_a_decoders_embeddings_of_the_truth_are_what_left(tmp_path: Path) -> None:
    with (
        checkpoint(TINY["t5"](), SUMMARISES) as source,
        open_parties(source, SUMMARISES, PartitionPlan(head_blocks=0, tail_blocks=1)) as parties,
        written_down(parties, tmp_path) as (_, sent),
    ):
        inputs = make_inputs(parties.whole.config, SUMMARISES)
        parties.data_party(**inputs)
        with torch.no_grad():
            parties.data_party.eval().generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5, num_beams=2
            )
    calls = log_of(tmp_path)
    assert len(calls) == len(sent) > 6
    embed = parties.whole.get_input_embeddings()
    for call, seen in zip(calls, sent, strict=True):
        assert torch.equal(embed(call.ids), seen.tensors["hidden"])
    assert {seen.meta.get("part") for seen in sent} == {"encoder", "decoder"}
    assert any(call.cache_rows_B is not None for call in calls)


@pytest.fixture
def bert() -> Iterator[Parties]:
    with checkpoint(TINY["bert"](), CLASSES) as source, open_parties(source, CLASSES, plan_of(Mode.HBT)) as parties:
        yield parties


def test_rows_are_named_by_their_tokens_and_a_sample_is_kept(tmp_path: Path, bert: Parties) -> None:
    inputs = make_inputs(bert.whole.config, CLASSES)
    texts = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(*(inputs[n] for n in ("input_ids", "attention_mask")), strict=True)
    ]
    with written_down(bert, tmp_path, every=3) as (truth, _):
        truth.name_rows([EncodedRow(tuple(texts[2]), 1, "third"), EncodedRow(tuple(texts[0]), 0, "first")])
        for _ in range(7):
            bert.data_party(**inputs)
    calls = log_of(tmp_path)
    assert [call.name for call in calls] == ["call:0", "call:3", "call:6"]
    assert {call.row_ids for call in calls} == {("first", "", "third")}


def test_nothing_that_befalls_it_reaches_the_session(
    tmp_path: Path, bert: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = make_inputs(bert.whole.config, CLASSES)
    vectors = bert.data_party.get_input_embeddings()(inputs["input_ids"])
    with written_down(bert, tmp_path):
        whole = bert.data_party(**inputs).logits
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        assert torch.allclose(bert.data_party(inputs_embeds=vectors, **rest).logits, whole, atol=1e-5)
    assert "given no tokens" in caplog.text
    assert len(log_of(tmp_path)) == 1


def test_hooks_and_files_end_with_the_session(tmp_path: Path, bert: Parties) -> None:
    inputs = make_inputs(bert.whole.config, CLASSES)
    hooks = [list(module._forward_pre_hooks) for module in bert.data_party.modules()]
    with written_down(bert, tmp_path, max_bytes=1 << 16):
        assert hooks != [list(module._forward_pre_hooks) for module in bert.data_party.modules()]
        for _ in range(100):
            bert.data_party(**inputs)
    folder = tmp_path / "job" / "truth" / "ann"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1 << 16
    kept = len(log_of(tmp_path))
    assert 10 < kept < 100
    bert.data_party(**inputs)
    assert len(log_of(tmp_path)) == kept
    assert hooks == [list(module._forward_pre_hooks) for module in bert.data_party.modules()]
    with pytest.raises(DataError, match="no vflair-truth"):
        read_truth_log(tmp_path)
