"""The main job on an in-process grid: what it writes, how it resumes, what it refuses."""

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import simulations.client_app
import simulations.server_app
from simulations.audit.settings import AuditSettings
from simulations.bench.settings import BenchSettings
from simulations.jobs import read_job
from simulations.launch import read_settings
from simulations.local_grid import LocalGrid
from simulations.moe.settings import MoeSettings
from simulations.settings import JobSettings
from vflair_flower.attacks import network_view, split_view
from vflair_flower.attacks.truth_log import read_truth
from vflair_flower.cli import app as cli
from vflair_flower.errors import CheckpointError, ConfigurationError
from vflair_flower.partition import PartitionPlan, load_tokenizer, resolve_model
from vflair_flower.report import Result
from vflair_flower.session import read_recording
from vflair_flower.session.header import Kind
from vflair_flower.settings import TaskSettings

ROOT = Path(__file__).resolve().parents[2]


def defaults():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def config(tmp_path, rows, tiny_bert, **changes):
    small = {
        "data": str(rows),
        "model": tiny_bert,
        "parties": 2,
        "rounds": 2,
        "passes": 2.0,
        "max-tokens": 16,
        "learning-rate": 0.01,
        "run-id": "job",
        "base-dir": str(tmp_path),
        "hub-bind": "inproc",
    }
    return {**defaults(), **small, **{k.replace("_", "-"): v for k, v in changes.items()}}


def run(settings, num_nodes=None):
    num_nodes = num_nodes or settings["parties"] + (settings["model-party"] == "node")
    nodes = [{"partition-id": i, "num-partitions": num_nodes} for i in range(num_nodes)]
    grid = LocalGrid(simulations.client_app.app, nodes, settings)
    simulations.server_app.app(grid, Context(1, 1, {}, RecordDict(), settings))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_party": "node", "body_mode": "sequential", "data_partition": "label-skew", "alpha": 1.0},
        {"mode": "HT", "tail_blocks": 0, "body_mode": "replicated", "wire_dtype": "bfloat16", "unsplit": False},
    ],
    ids=["default", "node", "HT"],
)
def test_job_writes_result_report_and_adapter(tmp_path, easy_rows, tiny_bert, changes):
    settings = config(tmp_path, easy_rows, tiny_bert, **changes)
    run(settings)
    folder = tmp_path / "runs" / "job"
    assert (tmp_path / "runs" / "latest").resolve() == folder.resolve()
    result = Result.read(folder / "result.json")
    assert result.metric.n == 30
    assert result.metric.majority == pytest.approx(1 / 3)
    assert (result.metric.unsplit is None) == (not settings["unsplit"])
    assert [r.round for r in result.rounds] == [1, 2]
    if settings["data-partition"] == "iid":  # two parties of other classes undo each other's steps at first
        assert result.rounds[1].loss < result.rounds[0].loss
    assert {p.name for p in result.parties} == {"party-0", "party-1", "model-party"}
    held = {p.name: p.parameters_held for p in result.parties}
    assert held["party-0"] + held["model-party"] == result.model.parameters
    assert all(p.peak_memory.activations > 0 for p in result.parties)
    assert result.traffic.total_bytes >= sum(r.sent_bytes for r in result.rounds) > 0
    assert not any(row.tensor.startswith("undescribed") for row in result.observers)
    assert "<svg" in (folder / "report.html").read_text()
    full, other = (AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval() for _ in range(2))
    adapter = PeftModel.from_pretrained(other, folder / "adapter").eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    assert not torch.equal(adapter(input_ids=ids).logits, full(input_ids=ids).logits)


def test_job_resumes_and_repeats_the_loss_curve(tmp_path, easy_rows, tiny_bert, monkeypatch):
    run(config(tmp_path, easy_rows, tiny_bert, run_id="whole", rounds=3, unsplit=False))
    from vflair_flower.clients import data_party

    train_round = data_party.train_round

    def fail_in_round_3(session, *args):
        if session.server_round == 3:
            raise OSError("the lights went out")
        return train_round(session, *args)

    monkeypatch.setattr(data_party, "train_round", fail_in_round_3)
    broken = config(tmp_path, easy_rows, tiny_bert, run_id="broken", rounds=3, unsplit=False)
    with pytest.raises(Exception, match="the lights went out"):
        run(broken)
    error = json.loads((tmp_path / "runs" / "broken" / "error.json").read_text())
    assert error["type"] == "PartyLostError"
    assert "party-" in error["message"]
    monkeypatch.undo()
    run({**broken, "run-id": "", "resume": "broken"})
    whole, resumed = (Result.read(tmp_path / "runs" / name / "result.json") for name in ("whole", "broken"))
    assert [(r.loss, r.metric) for r in whole.rounds] == [(r.loss, r.metric) for r in resumed.rounds]
    assert whole.metric.split == resumed.metric.split
    assert not (tmp_path / "runs" / "broken" / "error.json").exists()


def test_secure_aggregation_is_one_key_and_in_the_observer_table(tmp_path, easy_rows, tiny_bert):
    run(
        config(
            tmp_path, easy_rows, tiny_bert, rounds=1, local_steps=1, unsplit=False, audit="", secure_aggregation=True
        )
    )
    result = Result.read(tmp_path / "runs" / "job" / "result.json")
    (row,) = [row for row in result.observers if "before averaging" in row.tensor]
    assert row.covered_by.startswith("secagg")
    assert result.rounds[0].loss > 0
    assert not any(entry.operation == "average" for entry in result.traffic.entries)


def test_default_data_has_planted_secrets_written_down(tmp_path, easy_rows):
    run(config(tmp_path, easy_rows, "minilm-l6", data="messages", local_steps=1, rounds=1, unsplit=False))
    secrets = json.loads((tmp_path / "runs" / "job" / "secrets.json").read_text())
    assert {secret["kind"] for secret in secrets} >= {"account", "person"}


def test_job_records_what_adversaries_saw_and_parties_the_truth(tmp_path, easy_rows, tiny_bert):
    changes = {"record": "model-party, network", "record_every": 2, "record_max_mb": 2, "unsplit": False, "rounds": 1}
    run(config(tmp_path, easy_rows, tiny_bert, **changes))
    folder = tmp_path / "runs" / "job"
    assert {path.name for path in (folder / "recordings").iterdir()} == {"model-party", "network"}
    for path in (folder / "recordings").iterdir():
        assert 0 < sum(file.stat().st_size for file in path.iterdir()) < 2_000_000
    frames = [one for one in read_recording(folder / "recordings" / "network") if one.training]
    assert len(network_view(frames).frames) == len(frames)
    # By party: 6 of 12 forward, backward and averaging calls, 12 steps, 2 farewells, each with its reply.
    assert sum(one.kind in (Kind.CALL, Kind.REPLY) for one in frames) == 2 * 2 * (3 * 6 + 12 + 2)
    assert not (folder / "own").exists()
    seen = [one for one in read_recording(folder / "recordings" / "model-party") if one.training]
    task = TaskSettings(label_names=("card", "money", "parcel"))
    view = split_view(seen, plan=PartitionPlan(head_blocks=1, tail_blocks=1), num_blocks=4, task=task)
    tokenizer = load_tokenizer(resolve_model(tiny_bert))
    truth = read_truth(sorted((folder / "truth").iterdir()), seen, tokenizer)
    assert len(view.exchanges) == 2 * 6  # every other of 12 steps
    assert view.rows == len(truth.ids) == 96
    words = ("card", "money", "parcel")
    assert [truth.text(ids).split()[1] for ids in truth.ids] == [words[label] for label in truth.labels]
    assert all(row_id.startswith("train-") for row_id in truth.row_ids)
    assert Result.read(folder / "result.json").settings["record"] == "model-party, network"
    asked = ["audit", str(folder), "--attacks", "vmi:steps=30", "--epochs", "recorded end", "--rows", "16", "--json"]
    found = CliRunner().invoke(cli, asked)
    assert found.exit_code == 0, found.output
    recorded = {row["epoch"]: row for row in map(json.loads, found.stdout.splitlines())}["recorded"]
    assert recorded["n"] == 16
    assert recorded["metrics"]["position_accuracy"] > 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_blocks": 9}, "head_blocks is 9"),
        ({"mode": "HTB"}, "the partition mode is 'HTB'"),
        ({"mode": "HT"}, "tail_blocks is 1"),
        ({"data": "nowhere"}, "nowhere"),
        ({"text_column": "message"}, r"train\.jsonl:1.*message"),
        ({"model": "./nowhere"}, "nowhere"),
        ({"data": "messages"}, "task head of 3 classes, and the job's data has 12"),
        ({"parties": 0}, "parties is 0"),
        ({"parties": "four"}, "parties is 'four'; it takes a value of type int"),
        ({"data_partition": "by-age"}, "by-age"),
        ({"body_mode": "parallel"}, "parallel"),
        ({"wire_dtype": "int3"}, "int3"),
        ({"resume": "never"}, "run-id"),
        ({"record": "hubb"}, "the adversary to record is 'hubb'"),
        ({"record": "hub", "record_every": 0}, "every is 0"),
    ],
)
def test_bad_settings_are_refused_before_training(tmp_path, easy_rows, tiny_bert, changes, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = config(tmp_path, easy_rows, tiny_bert, **changes)
    with pytest.raises(ConfigurationError, match=message):
        run(settings, num_nodes=2)


def test_too_many_parties_at_once_are_refused_with_the_remedy(tmp_path, easy_rows, tiny_bert, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.raises(ConfigurationError, match=r"at most 5 at once.*Set parties to 5 or fewer"):
        run(config(tmp_path, easy_rows, tiny_bert, parties=6))


def test_resume_of_nothing_is_refused(tmp_path, easy_rows, tiny_bert):
    with pytest.raises(CheckpointError, match="never"):
        run(config(tmp_path, easy_rows, tiny_bert, resume="never", run_id=""))


def test_settings_know_every_key_of_the_run_configuration():
    known = defaults()
    moe = {f.name.replace("_", "-") for f in dataclasses.fields(MoeSettings)}
    split = JobSettings.from_run_config(known).to_flat()
    audit = {f.name.replace("_", "-") for f in dataclasses.fields(AuditSettings)}
    bench = {f.name.replace("_", "-") for f in dataclasses.fields(BenchSettings)}
    assert split.keys() | moe | audit | bench | {"job"} == known.keys()
    assert all(known[name] == value for name, value in split.items())
    assert isinstance(read_job(known), JobSettings)
    assert isinstance(read_job({**known, "job": "moe"}), MoeSettings)
    assert isinstance(read_job({**known, "job": "audit"}), AuditSettings)
    with pytest.raises(ConfigurationError, match="job is 'magic'"):
        read_job({**known, "job": "magic"})


def test_the_moe_job_refuses_what_it_would_not_read():
    assert isinstance(read_settings([str(ROOT / "simulations" / "moe_full.toml")]), MoeSettings)
    with pytest.raises(ConfigurationError, match="'dp-epsilon', and would run as if"):
        read_settings(["job='moe' dp-epsilon=8.0"])
