"""The job on other tasks than classes, on real rows: answers in contexts, and texts, Head-Tail and Head-Body-Tail."""

from pathlib import Path

import pytest

from tests.simulations.test_main_job import config, run
from tests.stories import save_stories
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.report import Result, summary_lines

MODES = pytest.mark.parametrize("mode", [{}, {"mode": "HT", "tail_blocks": 0}], ids=["HBT", "HT"])


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_stories(shared / "models" / "stories260K", tmp_path_factory.mktemp("stories") / "model"))


@MODES
def test_a_decoder_learns_to_write_answers(tmp_path, shared, stories, mode):
    settings = config(tmp_path, shared / "data" / "gsm8k", stories, task="gsm8k", max_rows=32, max_tokens=96, **mode)
    run(settings)
    result = Result.read(tmp_path / "runs" / "job" / "result.json")
    assert result.metric.name == "token-accuracy"
    assert result.metric.n == 32
    assert result.rounds[1].loss < result.rounds[0].loss - 0.1
    assert result.metric.majority < result.metric.split
    # Averages of two parties' gradients are the joined batch's: what is left is the order of sums, and chaos.
    assert result.metric.split == pytest.approx(result.metric.unsplit, abs=0.02)
    assert result.rounds[0].loss == pytest.approx(result.rounds[0].unsplit_loss, rel=0.01)
    assert result.metric.chance == pytest.approx(1 / 512)
    assert "token accuracy" in "\n".join(summary_lines(result))
    assert "commonest token" in (tmp_path / "runs" / "job" / "report.html").read_text()
    assert not any(row.tensor.startswith("undescribed") for row in result.observers)


@MODES
def test_an_encoder_learns_to_find_answers(tmp_path, shared, mode):
    settings = config(tmp_path, shared / "data" / "squad", "minilm-l6", task="squad", max_rows=16, **mode)
    run({**settings, "rounds": 1, "passes": 1.0, "learning-rate": 0.001, "max-tokens": 64})
    result = Result.read(tmp_path / "runs" / "job" / "result.json")
    assert result.metric.name == "f1"
    assert (result.metric.majority, result.metric.chance, result.data.classes) == (None, None, 0)
    assert result.rounds[0].loss == pytest.approx(result.rounds[0].unsplit_loss, rel=0.02)
    assert "F1" in (tmp_path / "runs" / "job" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"task": "gsm9k"}, DataError, "gsm9k"),
        ({"task": "squad", "data": "nowhere"}, DataError, "nowhere.* does not exist"),
        ({"task": "squad", "max_rows": -1}, ConfigurationError, "max-rows is -1"),
        ({"task": "lambada"}, DataError, "lambada"),
        ({"task": "stsb"}, DataError, "stsb"),
    ],
)
def test_tasks_that_cannot_be_trained_are_refused(tmp_path, easy_rows, tiny_bert, changes, error, said):
    settings = config(tmp_path, easy_rows, tiny_bert, **changes)
    with pytest.raises(error, match=said):
        run(settings, num_nodes=2)
