"""Audits of PC-MoE: every layer and coalition of hosts has its cell, and more hosts see more."""

import json

import pytest
from typer.testing import CliRunner

from tests.attacks.test_experts import made_up_rows
from tests.writers import save_sparse_writer
from vflair_flower.audit import ExpertSubject, GridSettings, cells_of, open_subject, read_subject
from vflair_flower.audit.experts import coverage_of, write_rows
from vflair_flower.cli import app as cli
from vflair_flower.errors import ConfigurationError


@pytest.fixture(scope="module")
def moe_run(tmp_path_factory):
    """Folder of a PC-MoE run: a tiny OLMoE with random weights and made-up texts."""
    model = save_sparse_writer(tmp_path_factory.mktemp("moe"))
    folder = tmp_path_factory.mktemp("run")
    write_rows(
        folder / "audit_rows.json",
        model=str(model),
        victims=made_up_rows(12, seed=1),
        auxiliary=made_up_rows(60, seed=2),
        max_tokens=16,
    )
    return folder


def test_a_cell_for_every_layer_and_coalition(moe_run):
    subject = open_subject(moe_run)
    assert isinstance(subject, ExpertSubject)
    assert read_subject(subject.to_json()) == subject
    cells = cells_of(GridSettings(attacks="text", cuts="all"), subject)
    who = {"hosts:party-1", "hosts:party-2", "hosts:party-3", "hosts:party-1+party-2", "hosts:party-1+party-2+party-3"}
    assert {cell.adversary for cell in cells} == who
    assert {cell.cut for cell in cells} == {f"layer {i}" for i in range(4)}
    assert {cell.attack for cell in cells} == {"gapped-vocabulary-matching", "host-inversion", "routing-trace"}


def test_refuses_layers_that_there_are_not(moe_run):
    with pytest.raises(ConfigurationError, match="4 layers"):
        cells_of(GridSettings(cuts="layer 7"), open_subject(moe_run))


def test_says_which_attacks_have_nobody_to_see_for(moe_run):
    with pytest.raises(ConfigurationError, match="vmi: nobody in this run sees a SplitView"):
        cells_of(GridSettings(attacks="vmi size-time"), open_subject(moe_run))


def test_reads_labels_off_gradients_and_texts_off_states(moe_run, tmp_path):
    attacks = "label-readout-expert gapped-vocabulary-matching"
    asked = ["audit", str(moe_run), "--attacks", attacks, "--cuts", "layer 3", "--rows", "6", "--out", str(tmp_path)]
    found = CliRunner().invoke(cli, [*asked, "--epochs", "start", "--json"])
    assert found.exit_code == 0, found.output
    rows = {(row["attack"], row["adversary"]): row for row in map(json.loads, found.stdout.splitlines())}
    together = "hosts:party-1+party-2+party-3"
    for attack in attacks.split():
        row = rows[attack, together]
        assert row["metrics"]["position_accuracy"] > row["chance"]["position_accuracy"] + 0.4, attack


def test_more_hosts_see_more(moe_run):
    subject = open_subject(moe_run, rows=8)
    one, all_others = (coverage_of(subject, hosts)[0] for hosts in (["party-1"], ["party-1", "party-2", "party-3"]))
    assert 0 < one < all_others <= 1
