"""lm-evaluation-harness on a cut model: the whole model's scores, answer by answer; and what is refused."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.serving import serving, wait_until
from tests.stories import save_stories
from vflair_flower.cli import app
from vflair_flower.errors import ConfigurationError
from vflair_flower.generation import harness, open_conversation
from vflair_flower.generation.harness import SplitLM, Tasks, evaluate_tasks
from vflair_flower.partition import Mode, PartitionPlan, load_tokenizer, resolve_model
from vflair_flower.settings import GenerationSettings

pytestmark = pytest.mark.timeout(240)
BOUNDS = GenerationSettings(max_rows=8, max_length=512)
ROWS = 4
PLANS = {
    "HBT": PartitionPlan(head_blocks=1, tail_blocks=1),
    "HT": PartitionPlan(mode=Mode.HT, head_blocks=2, tail_blocks=0),
}
PROMPTS = ("Once upon a time", "Lily and Tom went to the park and", "The big dog", "One day, a girl named Sue saw a")
UNTIL = {"until": ["\n"], "max_gen_toks": 16}


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_stories(shared / "models" / "stories260K", tmp_path_factory.mktemp("stories")))


@pytest.fixture(scope="module")
def whole(stories: str) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(stories)
    return HFLM(model, tokenizer=load_tokenizer(resolve_model(stories)), batch_size=ROWS)


def task(name: str, data: Path, **settings: Any) -> dict[str, Any]:
    source = {"data_files": {"test": str(data)}, "cache_dir": str(data.parent / "cache")}
    return {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", **settings}


def metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name} for name in names]


@pytest.fixture(scope="module")
def questions(shared: Path, whole: HFLM, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Questions with choices, last words, whole texts and texts to write: half of these are what the model writes."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, count in (("arc_easy", 16), ("lambada", 10)):
        lines = (shared / "data" / name / "test.jsonl").read_text().splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    asked = [Instance("generate_until", {}, (prompt, UNTIL), i) for i, prompt in enumerate(PROMPTS)]
    rows = [
        {"prompt": prompt, "target": text if i % 2 else "something else"}
        for i, (prompt, text) in enumerate(zip(PROMPTS, whole.generate_until(asked), strict=True))
    ]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}",
        "metric_list": metrics("exact_match"),
    }
    return [
        task(
            "choices",
            folder / "arc_easy.jsonl",
            output_type="multiple_choice",
            doc_to_text="Question: {{context}}\nAnswer:",
            doc_to_choice="{{choices}}",
            doc_to_target="{{label}}",
            metric_list=metrics("acc", "acc_norm"),
        ),
        task(
            "last-words",
            folder / "lambada.jsonl",
            output_type="loglikelihood",
            doc_to_text="{{context}}",
            doc_to_target=" {{target}}",
            metric_list=metrics("acc", "perplexity"),
        ),
        task(
            "texts",
            folder / "lambada.jsonl",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{context}}",
            metric_list=metrics("word_perplexity"),
        ),
        task("written", folder / "stories.jsonl", generation_kwargs=UNTIL, **written),
        task("beams", folder / "stories.jsonl", generation_kwargs={**UNTIL, "num_beams": 2}, **written),
    ]


def evaluated(model: Any, questions: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=questions, task_manager=manager, bootstrap_iters=0, **settings)


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    """What the model said to every question: log-likelihoods with whether they are the likeliest, or texts."""
    by_task = {}
    for name, samples in results["samples"].items():
        in_order = sorted(samples, key=lambda sample: sample["doc_id"])
        by_task[name] = [sample["resps"] for sample in in_order]
    return by_task


@pytest.fixture(scope="module")
def expected(whole: HFLM, questions: list[dict[str, Any]]) -> dict[str, Any]:
    return evaluated(whole, questions)


@pytest.fixture(scope="module")
def choices(whole: HFLM, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """The first task alone: the harness batches the questions of all tasks, and other batches round otherwise."""
    return evaluated(whole, questions[:1])


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> PartitionPlan:
    return PLANS[request.param]


def test_scores_and_every_answer_are_the_whole_models(
    stories: str, questions: list[dict[str, Any]], expected: dict[str, Any], plan: PartitionPlan
) -> None:
    with (
        serving(stories, "acme", plan=plan, bounds=BOUNDS) as ticket,
        open_conversation(ticket("acme")) as talk,
    ):
        lm = SplitLM(talk.model, talk.tokenizer, talk.spec.generation, batch_size=ROWS)
        found = evaluated(lm, questions)
        head = talk.model.get_output_embeddings()
        assert plan.mode is Mode.HBT or dict(head.named_parameters()) == {}, "the harness tied something into the hole"
    assert answers(found) == answers(expected)
    assert found["results"] == expected["results"]
    assert found["results"]["written"]["exact_match,none"] == 0.5
    assert len(answers(found)["choices"]) == 16
    assert len({likelihood for sample in answers(found)["choices"] for ((likelihood, _),) in sample}) > 60


def test_one_changed_weight_at_the_model_party_changes_every_likelihood(
    stories: str, questions: list[dict[str, Any]], expected: dict[str, Any], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(stories, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.weight"][0, 0] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with serving(str(other), "acme", bounds=BOUNDS) as ticket, open_conversation(ticket("acme"), model=stories) as talk:
        found = evaluated(SplitLM(talk.model, talk.tokenizer, BOUNDS, batch_size=ROWS), questions)
    wrong, right = (
        [likelihood for sample in answers(each)["choices"] for ((likelihood, _),) in sample]
        for each in (found, expected)
    )
    assert len(wrong) == 64
    assert all(abs(a - b) > 1e-3 for a, b in zip(wrong, right, strict=True))
    assert found["results"]["last-words"] != expected["results"]["last-words"]


def test_by_its_name_it_enters_the_session_and_leaves_it(
    stories: str, questions: list[dict[str, Any]], choices: dict[str, Any], tmp_path: Path
) -> None:
    with serving(stories, "acme", bounds=BOUNDS) as ticket:
        first = ticket("acme")
        first.write(tmp_path / "acme.ticket")
        arguments = f"ticket={tmp_path / 'acme.ticket'},model={stories}"
        found = evaluated("vflair", questions[:1], model_args=arguments, batch_size=ROWS)
        wait_until(lambda: ticket("acme") != first)  # a new one comes when the party has gone
    assert answers(found)["choices"] == answers(choices)["choices"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("model=x", "no ticket is named"),
        ("ticket=x,pretrained=gpt2", "the argument 'pretrained' is unknown"),
        ("ticket=/nowhere", "cannot be read"),
    ],
)
def test_wrong_arguments_are_refused(arguments: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        SplitLM.create_from_arg_string(arguments)


@pytest.fixture(scope="module")
def split(stories: str) -> Iterator[Any]:
    with serving(stories, "acme", bounds=BOUNDS) as ticket, open_conversation(ticket("acme")) as talk:
        yield talk


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 9}, "batch_size is 9, and the parties agreed on 8 rows"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "many"}, "batch_size is many"),
        ({"max_length": 513}, "max_length is 513, and the parties agreed on rows of 512"),
    ],
)
def test_more_than_was_agreed_is_refused_at_birth(split: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        SplitLM(split.model, split.tokenizer, BOUNDS, **settings)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"num_beams": 3}, "3 beams, with batches of 4 that is 12 rows.*batch size of 2"),
        ({"max_gen_toks": 64}, "asks for 64 new tokens .*has room for 64"),
        ({}, "asks for 256 new tokens"),
    ],
)
def test_texts_beyond_what_was_agreed_are_refused_before_anything_is_sent(
    split: Any, wanted: dict[str, Any], said: str
) -> None:
    lm = SplitLM(split.model, split.tokenizer, BOUNDS, batch_size=4, max_length=64)
    before = len(split._link.ledger.entries())
    with pytest.raises(ConfigurationError, match=said):
        lm.generate_until([Instance("generate_until", {}, ("Once upon", {"until": ["."], **wanted}), 0)])
    assert len(split._link.ledger.entries()) == before


def test_as_many_rows_as_agreed_by_default(split: Any) -> None:
    for batch_size in (None, "auto", "auto:4"):
        assert SplitLM(split.model, split.tokenizer, BOUNDS, batch_size=batch_size).batch_size == 8
    lm = SplitLM(split.model, split.tokenizer, GenerationSettings(max_rows=2, max_length=40))
    assert (lm.batch_size, lm.max_length) == (2, 40)


def test_a_model_that_does_not_write_is_refused(split: Any, tiny_bert: str) -> None:
    from transformers import AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    with pytest.raises(ConfigurationError, match="BertForSequenceClassification that cannot write"):
        SplitLM(classifier, split.tokenizer, BOUNDS)


def test_without_the_harness_the_way_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, harness.__name__)
    with pytest.raises(ConfigurationError, match=r"pip install 'vflair-flower\[eval\]'"):
        importlib.import_module(harness.__name__)


# ---- the command ----


@pytest.fixture(scope="module")
def written_task(questions: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("yaml") / "choices.yaml"
    path.write_text(json.dumps(questions[0]))  # JSON is YAML
    return path


def test_the_command_writes_a_table_and_every_answer(
    stories: str, choices: dict[str, Any], written_task: Path, tmp_path: Path
) -> None:
    """With the model party as a process beside this one."""
    output = tmp_path / "scores.json"
    arguments = ["evaluate", "--model", stories, "--tasks", str(written_task), "--batch-size", str(ROWS)]
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    read = json.loads(output.read_text())
    assert read["results"]["choices"]["acc,none"] == choices["results"]["choices"]["acc,none"]
    likelihoods = [[[first for first, _ in resp] for resp in sample] for sample in answers(choices)["choices"]]
    assert [[[first for first, _ in r] for r in sample] for sample in answers(read)["choices"]] == likelihoods
    assert "| task | questions | examples | metric | score | standard error |" in result.stdout
    assert "| choices | 16 | 0 | acc | 0.3750 | 0.1250 |" in result.stdout
    assert str(output) in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "no-such-task", "--ticket", "/nowhere"], "the tasks no-such-task cannot be loaded"),
        (["--tasks", ",", "--ticket", "/nowhere"], "no task is named"),
        (["--tasks", "x", "--include-path", "/nowhere"], "the folder of tasks is /nowhere, which is none"),
        (["--tasks", "x", "--output", "/nowhere/scores.json"], "/nowhere is no folder"),
    ],
)
def test_what_cannot_work_is_said_before_a_ticket_is_used(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())


def test_limit_and_examples_reach_the_harness(split: Any, questions: list[dict[str, Any]]) -> None:
    manager = TaskManager(include_defaults=False)
    tasks = Tasks(manager=manager, loaded=list(manager.load(questions[:1])["tasks"].values()))
    found = evaluate_tasks(split, tasks, limit=3, num_fewshot=2).results
    asked = [sample["arguments"][0][0] for sample in found["samples"]["choices"]]
    assert [text.count("Question: ") for text in asked] == [3, 3, 3]
