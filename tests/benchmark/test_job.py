"""A small matrix as a job: every cell trained and attacked at a node, resumable, and a leaderboard at the end."""

import json

import pytest
from flwr.app import Context, RecordDict

import simulations.client_app
import simulations.server_app
from simulations.launch import read_settings
from simulations.local_grid import LocalGrid
from tests.simulations.test_main_job import ROOT, defaults
from vflair_flower.benchmark import Matrix
from vflair_flower.errors import ConfigurationError

MATRIX = """
seeds = [0]
attacks = "vmi:steps=10,choices=1 norm-scoring"
audit-rows = 6
knowledge = "exact"

[base]
data = "rows"
model = "{model}"
parties = 1
rounds = 1
passes = 1.0
max-tokens = 16

[[settings]]
name = "HBT"

[[settings]]
name = "HT"
mode = "HT"
tail-blocks = 0

[[defences]]
name = "quantize"
sweep = ["quantize:bits=12", "quantize:bits=1"]
"""


def run(tmp_path, **changes):
    settings = {
        **defaults(), "job": "bench", "bench-matrix": "m.toml", "run-id": "bench", "base-dir": str(tmp_path), **changes,
    }  # fmt: skip
    grid = LocalGrid(simulations.client_app.app, [{}], settings)
    simulations.server_app.app(grid, Context(1, 1, {}, RecordDict(), settings))
    return tmp_path / "runs" / "bench"


@pytest.fixture
def matrix(tmp_path, easy_rows, tiny_bert):
    path = tmp_path / "m.toml"
    path.write_text(MATRIX.format(model=tiny_bert))
    return path


def test_a_small_matrix_runs_resumes_and_ranks(tmp_path, matrix):
    folder = run(tmp_path)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert {(row["setting"], row["defences"]) for row in rows} == {
        (setting, text) for setting in ("HBT", "HT") for text in ("", "quantize:bits=12", "quantize:bits=1")
    }
    by = {(row["setting"], row["defences"]): row for row in rows}
    for setting in ("HBT", "HT"):
        plain, fine, rough = (by[setting, text] for text in ("", "quantize:bits=12", "quantize:bits=1"))
        assert not plain["failed"]
        attack = "vmi:steps=10,choices=1"
        assert plain["ap"][attack] > 0.8
        assert fine["ap"][attack] == pytest.approx(plain["ap"][attack], abs=0.1)
        assert rough["ap"][attack] < plain["ap"][attack]
        assert plain["best_mp"] == fine["best_mp"] == rough["best_mp"] == plain["mp"]
        assert 0 <= plain["mp"] <= 1
    lines = (folder / "cells.jsonl").read_text().splitlines()
    (folder / "cells.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    run(tmp_path, resume="bench", **{"run-id": ""})
    again = (folder / "cells.jsonl").read_text().splitlines()
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["result"]["mp"] == json.loads(lines[-1])["result"]["mp"]
    assert "<h1>" in (folder / "leaderboard.html").read_text()
    assert json.loads((folder / "result.json").read_text())["failed"] == {}


def test_keys_that_the_job_does_not_have_are_refused_before_anything_runs(tmp_path, matrix):
    matrix.write_text(matrix.read_text().replace("parties = 1", "partis = 1"))
    with pytest.raises(ConfigurationError, match="partis"):
        run(tmp_path)
    assert not (tmp_path / "runs" / "bench" / "cells.jsonl").exists()


def test_a_matrix_must_be_named():
    with pytest.raises(ConfigurationError, match="bench-matrix"):
        read_settings(["job='bench'"])


def test_a_missing_model_is_refused_before_anything_runs(tmp_path, matrix):
    matrix.write_text(matrix.read_text().replace('mode = "HT"', 'mode = "HT"\nmodel = "./nowhere"'))
    with pytest.raises(Exception, match=r"nowhere.*does not exist"):
        run(tmp_path)
    assert not list((tmp_path / "runs" / "bench").glob("*.jsonl"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "simulations" / "bench" / "matrices").glob("*.toml")), ids=lambda p: p.stem
)
def test_shipped_matrices_are_of_jobs_that_exist(path):
    matrix = Matrix.read(path)
    assert {key for keys in matrix.settings.values() for key in keys} <= set(defaults())
    assert len(matrix.seeds) >= 3
    assert len({cell.name for cell in matrix.cells}) == len(matrix.cells)
