"""Three companies get three answers, each for its own reasons, and the proposed job runs."""

import json
import tomllib

import pytest
from typer.testing import CliRunner

from simulations.launch import read_settings
from tests.simulations.test_main_job import ROOT, config, run
from vflair_flower.advise import Company, advise, candidates, read_evidence
from vflair_flower.cli import app
from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import resolve_model

MEANS = {"memory_gb": 1.0, "link_mbit": 1000.0, "delay_ms": 1.0}


def rows(model: str) -> list[dict[str, object]]:
    """Made-up results of a benchmark: a defence that costs 2 points, one that costs 20, at two cuts of two modes."""
    made = []
    for mode, tail in (("HBT", 1), ("HT", 0)):
        for head in (1, 2):
            for defences, lost, read, labels in (
                ("", 0.0, 1.0 - 0.1 * head, 0.9 if mode == "HT" else 0.6),
                ("quantize:bits=2", 0.02, 0.5 - 0.1 * head, 0.6),
                ("quantize:bits=1", 0.2, 0.05, 0.5),
            ):
                made.append(
                    {
                        "setting": f"{mode} {head}", "defences": defences, "seed": 0, "mp": 0.9 - lost, "best_mp": 0.9,
                        "mp_metric": "accuracy", "ap": {"vmi": read, "norm-scoring": labels},
                        "goals": {"vmi": "text", "norm-scoring": "labels"},
                        "settings": {"model": model, "mode": mode, "head-blocks": head, "tail-blocks": tail},
                    }
                )  # fmt: skip
    return made


@pytest.fixture
def results(tmp_path, tiny_bert):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(tiny_bert)))
    return path


def company(model, **more) -> Company:
    return Company(**{"name": "it", "model": model, "classes": 3, **MEANS, **more})


def answer(model, results, **more):
    about = company(model, **more)
    return advise(about, candidates(about, resolve_model(model)), read_evidence([results]))


def test_three_companies_get_three_answers(tiny_bert, results):
    open_one = answer(tiny_bert, results, max_points_lost=0.0)
    careful = answer(tiny_bert, results, max_text_read=0.4, max_labels_read=0.7)
    anxious = answer(tiny_bert, results, max_text_read=0.1, max_points_lost=25.0)
    assert open_one.within
    assert open_one.best.evidence.defences == ""
    assert open_one.best.candidate.plan.mode == "HT"  # logits of three classes are less to send than hidden states
    assert careful.within
    assert careful.best.evidence.defences == "quantize:bits=2"
    assert anxious.within
    assert anxious.best.evidence.defences == "quantize:bits=1"
    for one in (open_one, careful, anxious):
        assert one.runner_up is not None
        text = "\n".join(one.lines())
        assert "Proposed:" in text
        assert "Runner-up:" in text
        assert "points lost" in text
    assert careful.best.candidate.wire_dtype == "bfloat16"


def test_what_nothing_keeps_is_said_and_the_nearest_is_shown(tiny_bert, results):
    found = answer(tiny_bert, results, max_text_read=0.01)
    assert not found.within
    assert found.best.evidence.defences == "quantize:bits=1" or found.best.evidence.text_read < 0.5
    assert "Nearest to the limits" in "\n".join(found.lines())


def test_memory_time_and_missing_evidence_each_have_their_line(tiny_bert, results, tmp_path):
    source = resolve_model(tiny_bert)
    smallest = min(one.memory_bytes for one in candidates(company(tiny_bert), source))
    short = answer(tiny_bert, results, memory_gb=smallest / 2e9)
    assert short.best is None
    assert set(short.refused) == {"memory of the data party"}
    slow = answer(tiny_bert, results, link_mbit=0.001)
    assert slow.best is None
    assert set(slow.refused) == {"time on the network"}
    (tmp_path / "none.jsonl").write_text("")
    unmeasured = answer(tiny_bert, tmp_path / "none.jsonl")
    assert unmeasured.best is None
    assert unmeasured.unmeasured == unmeasured.looked_at > 0
    with pytest.raises(ConfigurationError, match="nothing is proposed"):
        unmeasured.job_file()


def test_no_attack_measured_is_not_taken_for_no_leak(tiny_bert, tmp_path):
    path = tmp_path / "results.jsonl"
    texts_only = [{**row, "ap": {"vmi": row["ap"]["vmi"]}} for row in rows(tiny_bert)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts_only))
    assert answer(tiny_bert, path).within
    assert not answer(tiny_bert, path, max_labels_read=0.7).within


def test_time_is_that_of_the_link_and_a_codec_halves_the_bytes(tiny_bert):
    about = company(tiny_bert, parties=1, link_mbit=8.0, delay_ms=50.0)
    source = resolve_model(tiny_bert)
    for one in candidates(about, source):
        assert one.step_seconds == pytest.approx(one.step_bytes / 1e6 + 2 * 3 * 0.05)
    by = {(one.plan, one.tuning, one.quantization, one.wire_dtype): one for one in candidates(about, source)}
    for (plan, tuning, quantization, wire), one in by.items():
        if wire == "float32":
            assert by[plan, tuning, quantization, "bfloat16"].step_bytes == one.step_bytes // 2


def test_the_command_writes_a_job_that_runs(tmp_path, tiny_bert, easy_rows, results):
    described = tmp_path / "clinic.toml"
    described.write_text(
        f'model = "{tiny_bert}"\nclasses = 3\ndata = "{easy_rows}"\nparties = 2\nmemory_gb = 1.0\nlink_mbit = 100.0\n'
        "delay_ms = 5.0\nmax_text_read = 0.45\nmax_tokens = 16\n"
    )
    job = tmp_path / "job.toml"
    said = CliRunner().invoke(app, ["advise", str(described), "--results", str(results), "--out", str(job)])
    assert said.exit_code == 0, said.output
    assert "clinic:" in said.output
    keys = tomllib.loads(job.read_text())
    assert keys["defences"] == "quantize:bits=2"
    settings = read_settings([str(job)])
    assert settings.defences == "quantize:bits=2"
    changes = {name.replace("-", "_"): value for name, value in keys.items() if name not in ("data", "model")}
    run(config(tmp_path, easy_rows, tiny_bert, **{**changes, "rounds": 1, "unsplit": False, "audit": ""}))
    assert (tmp_path / "runs" / "job" / "result.json").is_file()


@pytest.mark.slow
def test_what_is_measured_for_a_company_is_its_evidence_and_stays(tmp_path, tiny_bert, easy_rows, monkeypatch):
    described = tmp_path / "clinic.toml"
    described.write_text(
        f'model = "{tiny_bert}"\nclasses = 3\ndata = "{easy_rows}"\nparties = 2\nmemory_gb = 1.0\nlink_mbit = 100.0\n'
        "delay_ms = 5.0\nmax_tokens = 16\n"
    )
    (tmp_path / "nothing.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    asked = ["advise", str(described), "--results", "nothing.jsonl", "--measure", "none quantize:bits=4"]
    said = CliRunner().invoke(app, asked)
    assert said.exit_code == 0, said.output
    assert "measured on 1 seed of" in said.output
    (kept,) = (tmp_path / "runs").glob("advise-*/results.jsonl")
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {one["defences"] for one in found} == {"", "quantize:bits=4"}
    assert len({one["setting"] for one in found}) == 2
    assert str(kept) in said.output.replace("\n", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory_gb = 0.0\nlink_mbit = 1.0\ndelay_ms = 1.0", "memory_gb is 0"),
        ("memory_gb = 1.0\nlink_mbit = 1.0\ndelay_ms = 1.0\nkind = 'poetry'", "poetry"),
        ("memory_gb = 1.0\nlink_mbit = 1.0\ndelay_ms = 1.0\nmax_text_read = 30.0", "max_text_read"),
        ("memory_gb = 1.0", "link_mbit"),
        ("memory_gb", "cannot be read"),
    ],
)
def test_bad_descriptions_are_refused(tmp_path, text, said):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        Company.read(path)
    path.write_text("{}\n")
    with pytest.raises(ConfigurationError, match="results"):
        read_evidence([path])


def test_the_companies_of_the_docs_get_three_answers_from_the_results_of_the_docs():
    docs = ROOT / "docs"
    evidence = read_evidence([docs / "benchmark" / "results.jsonl"])
    found = {}
    for name in ("shop", "agency", "clinic"):
        about = Company.read(docs / "companies" / f"{name}.toml")
        found[name] = advise(about, candidates(about, resolve_model(about.model)), evidence)
        assert found[name].within
    defences = {name: one.best.evidence.defences for name, one in found.items()}
    assert defences == {"shop": "", "agency": "custext:epsilon=10", "clinic": "custext:epsilon=5"}
