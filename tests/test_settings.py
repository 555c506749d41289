"""Settings: valid from birth, learning rates as a pure function, every step in one round, and JSON both ways."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vflair_flower.errors import ConfigurationError
from vflair_flower.partition import PartitionPlan
from vflair_flower.settings import LoraSettings, OptimizerSettings, TaskKind, TaskSettings, TrainingSettings
from vflair_flower.spec import SplitSpec

SPEC = SplitSpec(task=TaskSettings(label_names=("a", "b")))
NAN = math.nan


@pytest.mark.parametrize(
    ("settings", "given", "said"),
    [
        (TaskSettings, {}, "label_names has 0 entries"),
        (TaskSettings, {"label_names": ("a",)}, "label_names has 1 entries; a classifier needs at least two"),
        (TaskSettings, {"label_names": ("a", "b", "a")}, "label_names names 'a' more than once"),
        (TaskSettings, {"kind": "translation"}, "kind is 'translation'"),
        (LoraSettings, {"rank": 0}, "the LoRA rank is 0"),
        (LoraSettings, {"alpha": 0}, "the LoRA alpha is 0"),
        (LoraSettings, {"dropout": 1.0}, "the LoRA dropout is 1.0"),
        (LoraSettings, {"dropout": -0.1}, "the LoRA dropout is -0.1"),
        (LoraSettings, {"dropout": NAN}, "the LoRA dropout is nan"),
        (OptimizerSettings, {"name": "lion"}, "optimizer is 'lion'; known are 'adamw', 'sgd'"),
        (OptimizerSettings, {"schedule": "cosine"}, "schedule is 'cosine'; known are 'linear', 'constant'"),
        (OptimizerSettings, {"learning_rate": 0.0}, "learning_rate is 0.0"),
        (OptimizerSettings, {"learning_rate": -1}, "learning_rate is -1.0"),
        (OptimizerSettings, {"learning_rate": NAN}, "learning_rate is nan"),
        (OptimizerSettings, {"learning_rate": math.inf}, "learning_rate is inf"),
        (OptimizerSettings, {"weight_decay": -0.1}, "weight_decay is -0.1"),
        (OptimizerSettings, {"warmup_fraction": 1.0}, "warmup_fraction is 1.0"),
        (OptimizerSettings, {"warmup_fraction": -0.1}, "warmup_fraction is -0.1"),
        (TrainingSettings, {"rounds": 0}, "rounds is 0; choose 1 or more"),
        (TrainingSettings, {"batch_size": -3}, "batch_size is -3"),
        (TrainingSettings, {"evaluation_batch_size": 0}, "evaluation_batch_size is 0"),
        (TrainingSettings, {"max_tokens": 0}, "max_tokens is 0"),
        (TrainingSettings, {"local_steps": -1}, "local_steps is -1"),
        (TrainingSettings, {"passes": 0.0}, "passes is 0.0"),
        (TrainingSettings, {"passes": math.inf}, "passes is inf"),
        (TrainingSettings, {"passes": NAN}, "passes is nan"),
        (TrainingSettings, {"rounds": "six"}, "rounds is 'six'.*valid integer"),
        (TrainingSettings, {"round": 6}, "round is 6.*unexpected keyword"),
        (SplitSpec, {"task": TaskSettings(label_names=("a", "b")), "wire_dtype": "int8"}, "wire_dtype is 'int8'"),
        (SplitSpec, {}, "task is missing"),
    ],
)
def test_wrong_settings_are_refused_at_birth(settings: type, given: dict, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{settings.__name__}: .*{said}") as caught:
        settings(**given)
    assert "pydantic" not in str(caught.value)


def test_settings_are_keyword_only_and_frozen() -> None:
    with pytest.raises(ConfigurationError):
        TrainingSettings(6)
    with pytest.raises(AttributeError):
        SPEC.training.rounds = 7


def test_passes_may_be_anything_where_local_steps_count() -> None:
    settings = TrainingSettings(local_steps=5, passes=0.0, rounds=3)
    assert settings.total_steps(10**6) == 15
    assert settings.steps_of_round(2, 1) == range(5, 10)


def test_rates_by_hand() -> None:
    linear = OptimizerSettings(learning_rate=1.0)
    assert [linear.rate(step, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    warmed = OptimizerSettings(learning_rate=1.0, warmup_fraction=0.5)
    assert [warmed.rate(step, 8) for step in range(9)] == [0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25, 0.0]
    constant = OptimizerSettings(learning_rate=1.0, schedule="constant", warmup_fraction=0.5)
    assert [constant.rate(step, 4) for step in range(5)] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0, 1.0]


@given(
    total=st.integers(1, 500),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["linear", "constant"]),
    highest=st.floats(1e-6, 1.0),
)
def test_rates_rise_then_fall_and_never_leave_their_bounds(
    total: int, warmup: float, schedule: str, highest: float
) -> None:
    settings = OptimizerSettings(learning_rate=highest, warmup_fraction=warmup, schedule=schedule)
    rates = [settings.rate(step, total) for step in range(total)]
    assert rates == [settings.rate(step, total) for step in range(total)]
    assert all(0.0 < rate <= highest for rate in rates)
    rising = [step for step in range(total) if step < warmup * total]
    assert all(rates[step] < rates[step + 1] for step in rising[:-1])
    rest = rates[len(rising) :]
    assert rest == sorted(rest, reverse=True)
    assert settings.rate(total, total) == (highest if schedule == "constant" else 0.0)


@given(
    rounds=st.integers(1, 40),
    passes=st.floats(0.01, 20),
    local_steps=st.integers(0, 7),
    batch_size=st.integers(1, 64),
    rows=st.integers(1, 3000),
)
def test_rounds_cover_every_step_exactly_once(
    rounds: int, passes: float, local_steps: int, batch_size: int, rows: int
) -> None:
    settings = TrainingSettings(rounds=rounds, passes=passes, local_steps=local_steps, batch_size=batch_size)
    steps = [step for number in range(1, rounds + 1) for step in settings.steps_of_round(number, rows)]
    assert steps == list(range(settings.total_steps(rows)))
    sizes = [len(settings.steps_of_round(number, rows)) for number in range(1, rounds + 1)]
    assert max(sizes) - min(sizes) <= 1
    assert len(steps) >= 1


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_optimizers_are_built_as_set(name: str, kind: type) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = OptimizerSettings(name=name, learning_rate=0.5, weight_decay=0.25).build([parameter])
    assert type(optimizer) is kind
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.5, 0.25)
    assert optimizer.defaults.get("momentum", 0) == 0


@given(
    spec=st.builds(
        SplitSpec,
        model=st.text(max_size=20),
        plan=st.one_of(
            st.builds(PartitionPlan, head_blocks=st.integers(0, 9), tail_blocks=st.integers(0, 9)),
            st.builds(PartitionPlan, mode=st.just("HT"), head_blocks=st.integers(0, 9), tail_blocks=st.just(0)),
        ),
        task=st.one_of(
            st.builds(TaskSettings, label_names=st.lists(st.text(), min_size=2, max_size=4, unique=True).map(tuple)),
            st.just(TaskSettings(kind=TaskKind.CAUSAL_LM)),
        ),
        tuning=st.none() | st.builds(LoraSettings, rank=st.integers(1, 64), dropout=st.floats(0, 0.99)),
        optimizer=st.builds(
            OptimizerSettings, learning_rate=st.floats(1e-9, 10), name=st.sampled_from(["adamw", "sgd"])
        ),
        training=st.builds(TrainingSettings, rounds=st.integers(1, 99), passes=st.floats(0.1, 99)),
        wire_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
        seed=st.integers(0, 2**31),
    )
)
def test_specification_survives_json(spec: SplitSpec) -> None:
    assert SplitSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("part", [None, "plan", "task", "tuning", "optimizer", "training"])
def test_unknown_fields_in_json_are_refused(part: str | None) -> None:
    document = json.loads(SPEC.to_json())
    (document if part is None else document[part])["fancy"] = 1
    with pytest.raises(ConfigurationError, match=r"does not fit this version: .*fancy.*same version of vflair-flower"):
        SplitSpec.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("training", "rounds"), 0, "rounds is 0; choose 1 or more"),
        (("plan", "head_blocks"), -1, "head_blocks is -1; it counts blocks"),
        (("plan", "mode"), "TBH", "plan.mode is 'TBH'"),
        (("task", "label_names"), ["a"], "label_names has 1 entries"),
        (("seed",), "soon", "seed is 'soon'"),
        (("wire_dtype",), "int8", "wire_dtype is 'int8'"),
    ],
)
def test_wrong_values_in_json_are_refused(path: tuple[str, ...], value: object, said: str) -> None:
    document = json.loads(SPEC.to_json())
    place = document
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ConfigurationError, match=said):
        SplitSpec.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_what_is_no_specification_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="does not fit this version"):
        SplitSpec.from_json(text)
