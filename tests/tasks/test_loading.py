"""The catalogue's sets from folders and a stand-in for the hub: splits, columns by role, and errors with places."""

import json
from types import SimpleNamespace

import pytest

from tests.tasks.words import characters
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.settings import TaskKind
from vflair_flower.tasks import (
    CATALOGUE,
    DealSettings,
    HeldOut,
    NumberRow,
    Part,
    PromptRow,
    Row,
    Span,
    SpanRow,
    TaskDataset,
    TaskEntry,
    collate,
    deal,
    encode_task,
    load_task,
    task_entry,
    text_of,
)

TOKENIZER = characters(cls_token="[CLS]", sep_token="[SEP]")
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


def record(entry: TaskEntry, number: int) -> dict[str, object]:
    """Return a made-up record with the hub's own columns."""
    made: dict[str, object] = {}
    for role, names in entry.columns.items():
        if role == "id":
            continue
        value: object = f"{role} number {number}"
        if role == "label":
            value = number % len(entry.label_names) if entry.label_names else number / 4
        elif role == "answers" and entry.kind is TaskKind.QUESTION_ANSWERING:
            value = {"text": [f"number {number}"], "answer_start": [8]}
        elif role == "answers":
            value = ["stop"] * 6 + ["go"] * 4
        elif role == "image":
            value = {"bytes": PNG, "path": None}
        elif role == "image_id":
            value = f"picture {number // 2}"
        elif role in ("context", "target") and entry.name == "lambada":
            continue
        made[names[0]] = value
    return made


def write(folder, entry, files, count=40):
    folder.mkdir(exist_ok=True)
    for place, name in enumerate(files):
        rows = [record(entry, 1000 * place + number) for number in range(count)]
        for row in rows:
            if "image" in row:
                row["image"] = "one.png"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def parts(entry):
    return [how.names[0] for how in entry.splits.values() if isinstance(how, Part)]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets.load_dataset` that makes up 40 rows for each part that exists."""
    datasets = pytest.importorskip("datasets", reason="the extra 'simulation' is not installed")
    asked = []

    def load(hub_id, config, *, split):
        asked.append((hub_id, config, split))
        (entry, *_) = (
            e for e in CATALOGUE.values() if (e.hub_id, e.hub_config or None) == (hub_id, config) and split in parts(e)
        )
        offset = 1000 * parts(entry).index(split)
        rows = [record(entry, offset + number) for number in range(40)]
        made = datasets.Dataset.from_list(rows)
        return made.cast_column("image", datasets.Image()) if "image" in rows[0] else made

    monkeypatch.setattr(datasets, "load_dataset", load)
    return SimpleNamespace(asked=asked)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_set_loads_from_the_hub_and_from_files_of_the_same_columns(name, hub, tmp_path):
    entry = task_entry(name)
    from_hub = load_task(name)
    assert {(asked[0], asked[1]) for asked in hub.asked} == {(entry.hub_id, entry.hub_config or None)}
    assert from_hub.kind is entry.kind
    assert set(from_hub.splits) == set(entry.splits)
    from_files = load_task(name, source=write(tmp_path / name, entry, parts(entry)))
    for data in (from_hub, from_files):
        if entry.kind is not TaskKind.IMAGE_TEXT_TO_TEXT:
            rows = [row for split in data.splits.values() for row in split[:2]]
            encoded = encode_task(entry.kind, rows, TOKENIZER, max_tokens=48)
            assert collate(encoded, pad_token_id=0).input_ids.shape[0] >= len(rows)
        everything = [row.id for rows in data.splits.values() for row in rows]
        assert len(everything) == len(set(everything)) == 40 * len(parts(entry))
        texts = {split: {text_of(row) for row in rows} for split, rows in data.splits.items()}
        assert len(set().union(*texts.values())) == sum(map(len, texts.values()))
        for split, how in entry.splits.items():
            wanted = max(1, round(how.share * 40)) if isinstance(how, HeldOut) else None
            # Pictures come in groups of two.
            assert wanted is None or wanted <= len(data.splits[split]) <= wanted + 1
    assert [text_of(row) for row in from_hub.test] == [text_of(row) for row in from_files.test]


def test_what_the_rows_become(hub):
    (row, *_) = load_task("mnli").test
    assert row == Row("text number 1000", 1, "validation_matched:0", pair="pair number 1000")
    (row, *_) = load_task("stsb").test
    assert row == NumberRow("text number 1000", 250.0, "validation:0", pair="pair number 1000")
    (row, *_) = load_task("squad").test
    assert row == SpanRow("question number 1000", "context number 1000", (Span("number 1000", 8),), "validation:0")
    (row, *_) = load_task("lambada").test
    assert row == PromptRow("passage number", " 1000", "test:0")
    (row, *_) = load_task("gsm8k").test
    assert (row.prompt, row.response) == ("Question: question number 1000\nAnswer:", " answer number 1000")
    (row, *_) = load_task("humaneval").test
    assert row.tests == "tests number 0\ncheck(entry_point number 0)\n"
    (row, *_) = load_task("textvqa").test
    assert (row.response, row.references, row.image) == (" stop", ("stop",) * 6 + ("go",) * 4, PNG)
    assert row.prompt == "question number 1000\nAnswer the question using a single word or phrase."


def test_glue_development_rows_are_the_test_and_validation_is_cut_from_train(tmp_path):
    entry = task_entry("cola")
    folder = write(tmp_path / "cola", entry, ["train", "validation", "test"])
    hidden = [json.loads(line) | {"label": -1} for line in (folder / "test.jsonl").read_text().splitlines()]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hidden))
    data = load_task("cola", source=folder)
    assert [row.id for row in data.test] == [f"validation:{n}" for n in range(1, 41)]
    assert {row.id.split(":")[0] for row in data.validation} == {"train"}
    assert (len(data.train), len(data.validation)) == (36, 4)
    assert load_task("cola", source=folder) == data
    other = load_task("cola", source=folder, seed=1)
    assert {row.id for row in other.validation} != {row.id for row in data.validation}
    assert other.test == data.test


def test_a_folder_with_a_labelled_test_is_taken_at_its_word(tmp_path):
    data = load_task("cola", source=write(tmp_path / "c", task_entry("cola"), ["train", "validation", "test"]))
    assert [len(data.splits[split]) for split in ("train", "validation", "test")] == [40, 40, 40]
    assert {row.id.split(":")[0] for row in data.test} == {"test"}


def test_a_file_for_a_split_that_would_be_held_out_is_that_split(tmp_path):
    data = load_task("alpaca", source=write(tmp_path / "a", task_entry("alpaca"), ["train", "validation"]))
    assert {row.id.split(":")[0] for row in data.validation} == {"validation"}
    assert (len(data.train), len(data.test)) == (38, 2)
    assert {row.id.split(":")[0] for row in data.test} == {"train"}


def test_articles_are_never_parted(tmp_path):
    entry = task_entry("squad")
    folder = write(tmp_path / "s", entry, ["train", "validation"], count=60)
    rows = [json.loads(line) | {"title": f"article {n % 6}"} for n, line in enumerate((folder / "train.jsonl").open())]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_task("squad", source=folder)
    titles = {row.id: f"article {n % 6}" for n, row in enumerate(sorted(data.train + data.validation, key=_line))}
    assert len(data.validation) == 10
    assert not {titles[row.id] for row in data.validation} & {titles[row.id] for row in data.train}


def _line(row):
    return int(row.id.split(":")[1])


def test_a_premise_stays_with_all_its_hypotheses(tmp_path):
    folder = write(tmp_path / "m", task_entry("mnli"), ["train", "validation_matched"])
    rows = [{"premise": f"p {n % 15}", "hypothesis": f"h {n}", "label": n % 3} for n in range(45)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_task("mnli", source=folder)
    assert len(data.validation) == 6
    assert not {row.text for row in data.validation} & {row.text for row in data.train}


def test_equal_texts_are_never_parted(tmp_path):
    entry = task_entry("sst2")
    folder = write(tmp_path / "s", entry, ["train", "validation"])
    rows = [{"sentence": f"text {n % 4}", "label": n % 2} for n in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_task("sst2", source=folder)
    assert len(data.validation) == 10
    assert not {row.text for row in data.validation} & {row.text for row in data.train}


def test_the_input_decides_on_the_alpaca_prompt(tmp_path):
    folder = write(tmp_path / "a", task_entry("alpaca"), ["train"])
    rows = [{"instruction": f"do {n}", "input": "this" if n % 2 else "", "output": "done"} for n in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_task("alpaca", source=folder)
    for row in data.train:
        assert ("### Input:\nthis\n\n" in row.prompt) == (_line(row) % 2 == 0)
        assert row.prompt.endswith("### Response:\n")
        assert row.response == "done"


def test_at_most_so_many_rows_are_taken_the_same_ones_each_time(tmp_path, hub):
    folder = write(tmp_path / "g", task_entry("gsm8k"), ["train", "test"])
    some = load_task("gsm8k", source=folder, max_rows=5)
    assert {split: len(rows) for split, rows in some.splits.items()} == {"train": 5, "validation": 2, "test": 5}
    assert load_task("gsm8k", source=folder, max_rows=5) == some
    whole = load_task("gsm8k", source=folder)
    assert set(some.test) < set(whole.test)
    assert [row.image for row in load_task("textvqa", max_rows=3).train] == [PNG] * 3


BROKEN = {
    "column": (
        "cola",
        {"text_": "a", "label": 0},
        "train.jsonl:3: cola needs a column 'sentence' or 'text', and it is",
    ),
    "label": ("cola", {"sentence": "a", "label": 2}, "train.jsonl:3: 'label' is 2; a label of cola is one of 0..1"),
    "hidden": ("cola", {"sentence": "a", "label": -1}, "train.jsonl:3: 'label' is -1"),
    "truth": ("cola", {"sentence": "a", "label": True}, "train.jsonl:3: 'label' is True"),
    "blank": ("mrpc", {"sentence1": "a", "sentence2": " ", "label": 0}, "train.jsonl:3: 'pair' is ' ', a blank text"),
    "number": ("stsb", {"sentence1": "a", "sentence2": "b", "label": "4"}, "train.jsonl:3: 'label' is '4', but a regr"),
    "place": (
        "squad",
        {"question": "q", "context": "abc", "answers": {"text": ["c"], "answer_start": [1]}},
        "train.jsonl:3: the answer 'c' should start at character 1 of the context, but 'b' stands there",
    ),
    "form": ("squad", {"question": "q", "context": "abc", "answers": ["c"]}, "train.jsonl:3: 'answers' is ['c'], but"),
    "twice": ("gsm8k", {"question": "q", "answer": "#### 1", "id": "train:1"}, "the id 'train:1' was used at"),
    "not json": ("gsm8k", "{question", "train.jsonl:3: '{question' is not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_refused_with_file_and_line(case, tmp_path):
    name, broken, expected = BROKEN[case]
    folder = write(tmp_path / name, task_entry(name), ["train", "validation", "test"], count=2)
    line = broken if isinstance(broken, str) else json.dumps(broken)
    with (folder / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError) as caught:
        load_task(name, source=folder)
    assert expected in str(caught.value)


def test_labels_may_be_names(tmp_path):
    folder = write(tmp_path / "c", task_entry("cola"), ["train", "validation"])
    rows = [{"sentence": f"a {n}", "label": ("acceptable", "unacceptable")[n % 2]} for n in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {row.label for row in load_task("cola", source=folder).train} == {0, 1}


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"'imdb' is not in the catalogue.*cola, sst2"):
        load_task("imdb")
    with pytest.raises(DataError, match="does not exist"):
        load_task("cola", source=tmp_path / "nothing")
    folder = write(tmp_path / "c", task_entry("gsm8k"), ["train"])
    with pytest.raises(DataError, match=r"has no test\.jsonl with answers \(it holds train\.jsonl\)"):
        load_task("gsm8k", source=folder)
    (folder / "train.jsonl").rename(folder / "test.jsonl")
    with pytest.raises(DataError, match=r"has no train\.jsonl"):
        load_task("gsm8k", source=folder)
    with pytest.raises(ConfigurationError, match="max_rows is 0"):
        load_task("gsm8k", source=folder, max_rows=0)
    few = write(tmp_path / "few", task_entry("alpaca"), ["train"], count=2)
    with pytest.raises(DataError, match="too few to hold out validation, test"):
        load_task("alpaca", source=few)
    datasets = pytest.importorskip("datasets", reason="the extra 'simulation' is not installed")

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"No hub could be reached to read 'train' of 'nyu-mll/glue' \(Couldn't reach"):
        load_task("cola")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigurationError, match="name a folder with the rows as the source"):
        load_task("cola")


def test_the_eighteen_sets_are_there_and_none_reports_what_it_validates_on():
    assert sum(entry.counted for entry in CATALOGUE.values()) == 18
    for entry in CATALOGUE.values():
        named = parts(entry)
        assert len(named) == len(set(named))
        if entry.hub_id in ("nyu-mll/glue", "rajpurkar/squad", "lmms-lab/textvqa"):
            assert isinstance(entry.splits["validation"], HeldOut)
            assert entry.splits["test"].names[0].startswith("validation")


def test_an_entry_validates_at_birth():
    good = {"name": "x", "title": "X", "hub_id": "o/x", "metrics": (), "citation": ""}
    test = {"test": Part(("test",))}
    with pytest.raises(ConfigurationError, match="x: there is no test split"):
        TaskEntry(**good, kind=TaskKind.MASKED_LM, splits={}, columns={})
    with pytest.raises(ConfigurationError, match="x: no column has the role 'context'"):
        TaskEntry(**good, kind=TaskKind.QUESTION_ANSWERING, splits=test, columns={"question": (), "answers": ()})
    with pytest.raises(ConfigurationError, match="x: no column has the role 'b'"):
        TaskEntry(**good, kind=TaskKind.CAUSAL_LM, splits=test, columns={"a": ()}, template="{a}", response="{b}")
    with pytest.raises(ConfigurationError, match="needs a template and a response"):
        TaskEntry(**good, kind=TaskKind.CAUSAL_LM, splits=test, columns={"a": ()}, template="{a}")


class TestDataset:
    def test_a_set_has_examples_of_its_task_only(self):
        with pytest.raises(DataError, match="row 'a' of test is a Row, which the task 'causal-lm' cannot use"):
            TaskDataset(name="n", source="s", kind=TaskKind.CAUSAL_LM, splits={"test": (Row("a", 0, "a"),)})
        with pytest.raises(DataError, match="has no classes"):
            TaskDataset(
                name="n", source="s", kind=TaskKind.CAUSAL_LM, label_names=("a", "b"),
                splits={"test": (PromptRow("a", "b", "a"),)},
            )  # fmt: skip
        with pytest.raises(DataError, match="no split at all"):
            TaskDataset(name="n", source="s", kind=TaskKind.CAUSAL_LM, splits={})

    def test_masked_models_take_any_text(self):
        rows = (Row("a", 0, "a"), PromptRow("b", "c", "b"))
        data = TaskDataset(name="n", source="s", kind=TaskKind.MASKED_LM, splits={"train": rows})
        assert (data.train, data.validation, data.num_labels) == (rows, (), 0)

    @pytest.mark.parametrize("kind", ["iid", "quantity-skew"])
    def test_examples_of_any_task_are_dealt(self, kind):
        pytest.importorskip("flwr_datasets", reason="the extra 'simulation' is not installed")
        rows = [PromptRow(f"p {n}", "r", str(n)) for n in range(60)]
        dealt = deal(rows, 3, DealSettings(kind=kind, min_rows=2))
        assert sorted(row.id for party in dealt for row in party) == sorted(row.id for row in rows)

    def test_only_labels_can_be_skewed(self):
        pytest.importorskip("flwr_datasets", reason="the extra 'simulation' is not installed")
        with pytest.raises(DataError, match="row '0' is a PromptRow and has no label to skew by"):
            deal([PromptRow("p", "r", str(n)) for n in range(60)], 3, DealSettings(kind="label-skew"))
