"""The schema: what goes in comes out, what does not fit is refused by name, and the page of documentation is whole."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.report.samples import extreme_result, full_result, minimal_result
from vflair_flower.errors import ConfigurationError
from vflair_flower.report import Interval, RoundSummary, result

DOCS = Path(__file__).parents[2] / "docs" / "result.md"
RESULTS = [full_result, minimal_result, extreme_result]
SCHEMA = [
    cls
    for cls in vars(result).values()
    if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == result.__name__
]


@pytest.mark.parametrize("make", RESULTS)
def test_a_result_survives_its_file(make, tmp_path):
    path = tmp_path / "runs" / "one" / "result.json"
    make().write(path)
    assert result.Result.read(path) == make()
    assert [file.name for file in path.parent.iterdir()] == ["result.json"], "no temporary file stays behind"


def _paths(value, where=()):
    """Yield where every field of the schema lies; keys of free mappings are not fields."""
    if isinstance(value, dict):
        for name, item in value.items():
            if where[-1:] not in (("settings",), ("versions",), ("seconds",)) and where[-2:] != ("data", "rows"):
                yield (*where, name)
                yield from _paths(item, (*where, name))
    elif isinstance(value, list) and value:
        yield from _paths(value[0], (*where, 0))


@pytest.mark.parametrize("path", list(_paths(full_result().to_json())), ids=str)
def test_a_missing_field_is_refused_by_its_name(path):
    plain = full_result().to_json()
    holder = plain
    for step in path[:-1]:
        holder = holder[step]
    del holder[path[-1]]
    with pytest.raises(ConfigurationError, match=rf"{path[-1]}' is missing"):
        result.Result.from_json(plain)


@pytest.mark.parametrize("version", [0, 1, 4, "2", 1.5, True, None])
def test_an_unknown_version_is_refused(version):
    with pytest.raises(ConfigurationError, match="schema_version"):
        result.Result.from_json({**full_result().to_json(), "schema_version": version})


def test_an_unknown_field_is_refused():
    plain = full_result().to_json()
    plain["model"]["flavour"] = "sweet"
    with pytest.raises(ConfigurationError, match=r"model\.flavour"):
        result.Result.from_json(plain)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("seed",), "one"),
        (("seed",), True),
        (("status",), "running"),
        (("metric", "split"), None),
        (("metric", "split_interval", "low"), "0.9"),
        (("rounds",), {}),
        (("rounds", 0, "seconds", "train"), "long"),
        (("parties", 0, "role"), "spectator"),
        (("traffic", "entries", 0, "max_shape", 1), 1.5),
        (("settings", "rounds"), [1]),
        (("model",), 3),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused_by_its_name(path, value):
    plain = full_result().to_json()
    holder = plain
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    with pytest.raises(ConfigurationError) as caught:
        result.Result.from_json(plain)
    assert f"'{name}'" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: {"model": dataclasses.replace(r.model, body_blocks=3)},
        lambda r: {"model": dataclasses.replace(r.model, trainable_parameters=r.model.parameters + 1)},
        lambda r: {"data": dataclasses.replace(r.data, evaluated_on="dev")},
        lambda r: {"metric": dataclasses.replace(r.metric, split=96.1)},
        lambda r: {"metric": dataclasses.replace(r.metric, difference=0.5)},
        lambda r: {"metric": dataclasses.replace(r.metric, unsplit=None)},
        lambda r: {"traffic": dataclasses.replace(r.traffic, total_bytes=1)},
        lambda r: {"parties": (dataclasses.replace(r.parties[0], peak_memory_bytes=1),)},
        lambda r: {"parties": ()},
        lambda r: {"created": "2025-01-31T12:00:00"},
        lambda r: {"created": "yesterday"},
        lambda r: {"run_id": ""},
        lambda r: {"duration_s": -1.0},
        lambda r: {"duration_s": float("nan")},
        lambda r: {"schema_version": 4},
    ],
)
def test_what_does_not_add_up_cannot_be_built(change):
    with pytest.raises(ConfigurationError):
        full_result(**change(full_result()))


def test_an_interval_is_ordered():
    with pytest.raises(ConfigurationError, match="low"):
        Interval(low=0.9, high=0.1, confidence=0.95, method="Wilson")


def test_a_diverged_round_does_not_cost_the_result(tmp_path):
    path = tmp_path / "result.json"
    diverged = dataclasses.replace(full_result().rounds[0], loss=float("nan"), metric=float("inf"))
    assert isinstance(diverged, RoundSummary)
    full_result(rounds=(diverged,)).write(path)
    assert json.loads(path.read_text())["rounds"][0]["loss"] is None


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", "3"])
def test_what_is_not_a_result_is_refused(content, tmp_path):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"result\.json"):
        result.Result.read(path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    full_result(run_id="old").write(path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        full_result(run_id="new").write(path)
    assert result.Result.read(path).run_id == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("cls", SCHEMA, ids=lambda cls: cls.__name__)
def test_every_field_is_documented_under_its_class(cls):
    sections = DOCS.read_text(encoding="utf-8").split("\n## ")
    section = next((text for text in sections if text.splitlines()[0].endswith(f"`{cls.__name__}`")), "")
    missing = [field.name for field in dataclasses.fields(cls) if f"| `{field.name}` |" not in section]
    assert not missing, f"docs/result.md does not explain {missing} of {cls.__name__}"
