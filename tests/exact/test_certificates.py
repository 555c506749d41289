"""The certificates themselves: green for every family of the table, red for every way of getting it wrong."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, PreTrainedConfig
from typer.testing import CliRunner

from vflair_flower.certificate import TINY, Certificate, admit, certify, certify_all, certify_model, markdown
from vflair_flower.certificate.parties import Parties
from vflair_flower.cli import app
from vflair_flower.errors import ConfigurationError, ModelError
from vflair_flower.partition import Mode, PartitionPlan, SplitCache
from vflair_flower.partition.loading import tasks_of
from vflair_flower.partition.structure import FAMILIES, VISION_LANGUAGE, family_name, modes_of
from vflair_flower.settings import TaskKind

CLASSIFY, WRITE, MASKED = TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.CAUSAL_LM, TaskKind.MASKED_LM


HELD_TWICE = ("albert", "t5", "t5-gated")
"""Both parties hold a copy of some parameters, also in Head-Body-Tail: one block for all layers, or a position bias."""


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Certificate]]:
    class Rows(dict[str, list[Certificate]]):
        """Each family's rows, certified when they are first asked for: all at once outlast a test's deadline."""

        def __missing__(self, name: str) -> list[Certificate]:
            self[name] = certify_all([name])
            return self[name]

    return Rows()


def test_every_family_has_a_row() -> None:
    configs = [make() for make in TINY.values()]
    assert {family_name(config) for config in configs} == set(FAMILIES)
    assert set(VISION_LANGUAGE) <= {config.model_type for config in configs}


@pytest.mark.parametrize("name", TINY)
def test_certificate_is_green(name: str, rows: dict[str, list[Certificate]]) -> None:
    own = rows[name]
    assert [row for row in own if not row.ok] == []
    config = TINY[name]()
    assert {(row.task, row.mode) for row in own} == {
        (k.value, m.value) for k in tasks_of(config) for m in modes_of(config)
    }
    for row in own:
        assert row.logits_equal
        assert row.steps_equal
        assert row.generation_equal is (True if TaskKind(row.task).writes else None)
        assert row.max_gradient_error == 0 or (name in HELD_TWICE and row.max_gradient_error < 1e-6)


OTHER_CUTS = {
    "0-4-0": PartitionPlan(head_blocks=0, tail_blocks=0),
    "0-3-1": PartitionPlan(head_blocks=0, tail_blocks=1),
    "3-1-0": PartitionPlan(head_blocks=3, tail_blocks=0),
    "HT-0": PartitionPlan(mode=Mode.HT, head_blocks=0, tail_blocks=0),
    "HT-3": PartitionPlan(mode=Mode.HT, head_blocks=3, tail_blocks=0),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("plan", OTHER_CUTS.values(), ids=OTHER_CUTS)
def test_other_cuts_are_exact_too(name: str, plan: PartitionPlan) -> None:
    config = TINY[name]()
    if plan.mode not in modes_of(config):
        pytest.skip("cut in Head-Body-Tail only")
    kind = next((k for k in tasks_of(config) if k.writes), CLASSIFY)
    row = certify(name, config, kind, plan.mode, plan=plan)
    assert row.ok, row


def _change_a_weight(parties: Parties) -> None:
    weight = next(p for n, p in parties.server.module.named_parameters() if p.dim() == 2 and "embed" not in n)
    with torch.no_grad():
        weight[0, 0] += 1e-3


def _see_padding(parties: Parties) -> None:
    run = parties.server._run

    def without_mask(hidden_BTD: Tensor, mask_BT: Tensor | None, *args: Tensor | None, **kwargs: object) -> Tensor:
        return run(hidden_BTD, None if mask_BT is None else torch.ones_like(mask_BT), *args, **kwargs)  # type: ignore[arg-type]

    parties.server._run = without_mask  # type: ignore[assignment]


def _forget_a_gradient(parties: Parties) -> None:
    add = parties.server._update.add_gradients
    parties.server._update.add_gradients = lambda party, own: add(party, dict(list(own.items())[1:]))  # type: ignore[method-assign]


def _step_twice(parties: Parties) -> None:
    apply = parties.server._update._apply

    def twice(*args: object) -> None:
        apply(*args)  # type: ignore[arg-type]
        with torch.no_grad():
            next(iter(parties.server._update.parameters.values())).mul_(1.001)

    parties.server._update._apply = twice  # type: ignore[method-assign]


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    ("name", "kind", "tamper", "wrong"),
    [
        ("bert", CLASSIFY, _change_a_weight, "logits_equal"),
        ("llama", WRITE, _change_a_weight, "logits_equal"),
        ("bert", MASKED, _see_padding, "logits_equal"),
        ("llama", WRITE, _see_padding, "generation_equal"),
        ("llama", CLASSIFY, _forget_a_gradient, "max_gradient_error"),
        ("bert", CLASSIFY, _step_twice, "steps_equal"),
    ],
)
def test_a_spoilt_party_is_caught(
    name: str, kind: TaskKind, tamper: Callable[[Parties], None], wrong: str, mode: Mode
) -> None:
    row = certify(name, TINY[name](), kind, mode, tamper=tamper)
    assert not row.ok
    assert row.max_gradient_error > 0 if wrong == "max_gradient_error" else getattr(row, wrong) is False


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("name", ["llama", "gpt-oss", "gemma3"])
def test_a_plain_cache_at_the_model_party_is_caught(name: str, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain_cache(config: PreTrainedConfig, _blocks: object) -> DynamicCache:
        return DynamicCache(config=config)

    monkeypatch.setattr("vflair_flower.remote.caches.segment_cache", plain_cache)
    row = certify(name, TINY[name](), WRITE, mode)
    assert not row.ok
    assert row.generation_equal is False


def test_a_beam_search_that_nobody_follows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitCache, "take_changes", lambda self: (None, 0))
    row = certify("llama", TINY["llama"](), WRITE, Mode.HBT)
    assert row.generation_equal is False
    assert "beam" in row.remark
    assert "greedy" not in row.remark


def test_an_unknown_family_is_certified_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "gpt_neox", raising=False)
    admit(AutoConfig.for_model("gpt_neox"))
    assert "gpt_neox" in FAMILIES
    monkeypatch.delitem(FAMILIES, "gpt_neox")


def test_a_family_that_fails_is_refused_and_stays_unknown() -> None:
    config = AutoConfig.for_model("bloom")  # its blocks return a tuple, which no row says
    with pytest.raises(ModelError, match=r"'bloom' has no certificate.*comparisons failed, the first for "):
        admit(config)
    assert "bloom" not in FAMILIES
    assert any(row.ok is False and row.remark for row in certify_model(config))
    assert "bloom" not in FAMILIES


def test_json_has_one_row_per_family_task_and_mode(rows: dict[str, list[Certificate]]) -> None:
    result = CliRunner().invoke(app, ["verify", "--model", "qwen2", "--json"])
    assert result.exit_code == 0, result.output
    printed = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert printed == [row.to_dict() for row in rows["qwen2"]]
    assert set(printed[0]) >= {
        *("family", "task", "mode", "logits_equal", "max_gradient_error", "steps_equal", "generation_equal", "ok")
    }


def test_verify_fails_when_a_family_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitCache, "take_changes", lambda self: (None, 0))
    result = CliRunner().invoke(app, ["verify", "--model", "llama"])
    assert result.exit_code == 1
    assert "1 failed" in result.output or "2 failed" in result.output


@pytest.mark.parametrize("arguments", [[], ["--all", "--model", "bert"]])
def test_verify_needs_one_of_model_and_all(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["verify", *arguments]).exit_code == 2


def test_unknown_row_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'bort'; the table has albert, bert"):
        certify_all(["bort"])


def test_the_matrix_in_the_docs_is_this_one(rows: dict[str, list[Certificate]]) -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    assert markdown([row for name in TINY for row in rows[name]]) in page, "regenerate it: make families"
