"""Data sets: what is refused, with file and line, and what comes out of a good folder, a hub and the shared sets."""

import json
import logging
import pickle
from pathlib import Path

import pytest

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks import Row, TextDataset, load_text_dataset

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
GOOD = '{"text": "fine", "label": 0}\n{"text": "broken", "label": 1}\n'


def write_folder(folder: Path, **files: str | bytes) -> Path:
    files = {"train.jsonl": GOOD, "validation.jsonl": GOOD} | {
        name.replace("__", "."): content for name, content in files.items()
    }
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# split, the file's content, and what the message must name: the line and the value.
BROKEN = {
    "not json": ("train", GOOD + "{text: 1}\n", "train.jsonl:3: '{text: 1}' is not JSON"),
    "cut off": ("train", '{"text": "a", "la', "train.jsonl:1: "),
    "blank line": ("train", GOOD + "\n" + GOOD, "train.jsonl:3: '' is not JSON"),
    "deep": ("train", "[" * 100_000, "train.jsonl:1: "),
    "not an object": ("train", GOOD + "[1, 2]\n", "train.jsonl:3: '[1, 2]' is not a JSON object"),
    "no text": ("train", '{"label": 0}\n', "train.jsonl:1: the column 'text' is missing (the line has 'label')"),
    "no label": ("validation", GOOD + '{"text": "a"}\n', "validation.jsonl:3: the column 'label' is missing"),
    "number for text": ("train", '{"text": 7, "label": 0}\n', "train.jsonl:1: 'text' is 7, not a text"),
    "null for text": ("train", '{"text": null, "label": 0}\n', "train.jsonl:1: 'text' is None"),
    "blank text": ("train", GOOD + '{"text": " \\t", "label": 0}\n', "train.jsonl:3: 'text' is ' \\t', a blank text"),
    "half a pair": ("train", '{"text": "\\ud83d", "label": 0}\n', "train.jsonl:1: 'text' is '\\ud83d' and holds half"),
    "float label": ("train", '{"text": "a", "label": 1.0}\n', "train.jsonl:1: 'label' is 1.0; a label is"),
    "null label": ("train", '{"text": "a", "label": null}\n', "train.jsonl:1: 'label' is None"),
    "bool label": ("train", '{"text": "a", "label": true}\n', "train.jsonl:1: 'label' is True"),
    "list label": ("test", '{"text": "a", "label": [0]}\n', "test.jsonl:1: 'label' is [0]"),
    "blank label": ("train", '{"text": "a", "label": ""}\n', "train.jsonl:1: 'label' is ''"),
    "negative label": ("train", GOOD + '{"text": "a", "label": -1}\n', "train.jsonl:3: 'label' is -1"),
    "gap": (
        "train",
        GOOD + '{"text": "a", "label": 3}\n',
        "train.jsonl:3: the label is 3, but no train row has label 2",
    ),
    "huge": ("train", GOOD + '{"text": "a", "label": 99999999999}\n', "train.jsonl:3: the label is 99999999999"),
    "mixed": ("train", GOOD + '{"text": "a", "label": "late"}\n', "train.jsonl:3: the label is 'late', but"),
    "mixed splits": ("validation", '{"text": "a", "label": "late"}\n', "validation.jsonl:1: the label is 'late', but"),
    "unknown int": ("validation", GOOD + '{"text": "a", "label": 2}\n', "validation.jsonl:3: the label is 2, but"),
    "unknown in test": ("test", GOOD + '{"text": "a", "label": 9}\n', "test.jsonl:3: the label is 9, but"),
    "two names": (
        "train",
        '{"text": "a", "label": 0, "label_name": "x"}\n{"text": "b", "label": 0, "label_name": "y"}\n' + GOOD,
        "train.jsonl:2: label 0 is called 'y', but at",
    ),
    "name is a number": ("train", '{"text": "a", "label": 0, "label_name": 3}\n', "train.jsonl:1: 'label_name' is 3"),
    "id twice": ("train", '{"text": "a", "label": 0, "id": 5}\n' * 2, "train.jsonl:2: the id '5' was used at"),
    "empty": ("train", "", "train.jsonl:1: the file is empty"),
    "only line ends": ("validation", "\n\n", "validation.jsonl:1: the file is empty"),
    "latin-1": ("train", GOOD.encode() + b'{"text": "caf\xe9", "label": 0}', "train.jsonl:3: byte 0xe9 at place 14"),
    "one label": ("train", '{"text": "a", "label": 0}\n', "fewer than two labels"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_refused_with_file_line_and_value(case: str, tmp_path: Path) -> None:
    split, content, expected = BROKEN[case]
    files = {f"{split}__jsonl": content}
    if case == "one label":
        files["validation__jsonl"] = content
    with pytest.raises(DataError) as caught:
        load_text_dataset(write_folder(tmp_path, **files))
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_missing_file_is_named_and_so_is_what_is_there(split: str, tmp_path: Path) -> None:
    (write_folder(tmp_path) / f"{split}.jsonl").unlink()
    (tmp_path / "dev.tsv").touch()
    with pytest.raises(DataError, match=rf"no {split}\.jsonl \(it holds dev\.tsv, "):
        load_text_dataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"0": "a"}', "not a list of names"),
        ("[]", "not a list of names"),
        ("[1, 2]", "'name 0' is 1"),
        ('["a", " "]', "'name 1' is ' '"),
        ('["a"', "not JSON"),
        (b"\xff", "not JSON in utf-8"),
        ('["a", "b", "a"]', "the label name 'a' is given to two labels"),
        ('["a", "b"]', "train.jsonl:3: the label is 2, but"),
    ],
)
def test_broken_label_names_are_refused(content: str | bytes, expected: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, labels__json=content, train__jsonl=GOOD + '{"text": "c", "label": 2}\n')
    with pytest.raises(DataError) as caught:
        load_text_dataset(folder)
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_int_labels_take_names_from_the_file_the_column_or_themselves(tmp_path: Path) -> None:
    assert load_text_dataset(write_folder(tmp_path)).label_names == ("0", "1")
    named = '{"text": "a", "label": 1, "label_name": "late"}\n{"text": "b", "label": 0}\n'
    assert load_text_dataset(write_folder(tmp_path, train__jsonl=named)).label_names == ("0", "late")
    # The file may name a label that no train row has.
    folder = write_folder(tmp_path, labels__json='["x", "y", "z"]', test__jsonl='{"text": "a", "label": 2}')
    assert load_text_dataset(folder).label_names == ("x", "y", "z")
    assert load_text_dataset(folder).test == (Row("a", 2, "test:1"),)


def test_string_labels_are_the_sorted_labels_of_train(tmp_path: Path) -> None:
    train = '{"text": "a", "label": "late"}\n{"text": "b", "label": "broken"}\n'
    data = load_text_dataset(write_folder(tmp_path, train__jsonl=train, validation__jsonl=train))
    assert data.label_names == ("broken", "late")
    assert [row.label for row in data.train] == [1, 0]
    unknown = '{"text": "a", "label": "lost"}\n'
    with pytest.raises(DataError, match=r"validation\.jsonl:1: the label is 'lost', but the train rows have 2 labels"):
        load_text_dataset(write_folder(tmp_path, train__jsonl=train, validation__jsonl=unknown))


def test_lines_end_at_line_feeds_only_and_files_may_come_from_windows(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    line = json.dumps({"text": text, "label": 0}, ensure_ascii=False)
    train = ("\ufeff" + line + "\n" + GOOD).replace("\n", "\r\n")
    data = load_text_dataset(write_folder(tmp_path, train__jsonl=train))
    assert [row.text for row in data.train] == [text, "fine", "broken"]
    assert [row.id for row in data.train] == ["train:1", "train:2", "train:3"]


def test_columns_can_be_named_and_a_relative_folder_has_a_base(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    content = '{"body": "a", "intent": "x"}\n{"body": "b", "intent": "y"}\n'
    write_folder(tmp_path / "mine", train__jsonl=content, validation__jsonl=content)
    data = load_text_dataset("mine", text_column="body", label_column="intent", base_dir=tmp_path)
    assert (data.name, data.label_names, data.secrets) == ("mine", ("x", "y"), ())
    assert pickle.loads(pickle.dumps(data)) == data


@pytest.mark.parametrize("source", ["/no/such/folder", "./nothing", "a/b/c", "..", " ", Path("nothing")])
def test_what_can_only_be_a_folder_is_not_looked_for_on_a_hub(
    source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vflair_flower.tasks.hub._loaded", None)
    with pytest.raises(DataError, match=r"does not exist|blank name|has no train"):
        load_text_dataset(source, base_dir=tmp_path)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a file, but a data set is a folder"):
        load_text_dataset(write_folder(tmp_path) / "train.jsonl")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"train": ()}, "no validation split"),
        ({"train": (Row("a", 0, "1"),), "validation": ()}, "validation split has no rows"),
        ({"train": (Row("a", 2, "1"),), "validation": (Row("a", 0, "1"),)}, "row '1' of train has label 2"),
        ({"train": (Row("a", 0, "1"),) * 2, "validation": (Row("a", 0, "1"),)}, "the id '1' comes twice"),
        ({"train": (), "dev": ()}, "split 'dev' is not one of"),
    ],
)
def test_a_data_set_validates_at_birth(rows: dict[str, tuple[Row, ...]], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        TextDataset(name="n", source="s", label_names=("x", "y"), splits=rows)


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch):
        datasets = pytest.importorskip("datasets", reason="the extra 'simulation' is not installed")

        def holds(**splits: tuple[list[str], list[int | None]]) -> None:
            features = datasets.Features(
                {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
            )
            loaded = {
                split: datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
                for split, (texts, labels) in splits.items()
            }
            monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)

        return holds

    def test_names_come_from_the_features_and_unlabelled_test_rows_go(self, hub) -> None:
        hub(train=(["a", "b"], [1, 0]), validation=(["c"], [1]), test=(["d", "e"], [-1, -1]))
        data = load_text_dataset("owner/set")
        assert (data.name, data.source, data.label_names) == ("set", "owner/set", ("bad", "good"))
        assert data.train == (Row("a", 1, "train:0"), Row("b", 0, "train:1"))
        assert "test" not in data.splits

    def test_a_missing_validation_split_is_carved_in_a_fixed_order(self, hub, caplog: pytest.LogCaptureFixture) -> None:
        hub(train=([f"text {index}" for index in range(50)], [index % 2 for index in range(50)]))
        with caplog.at_level(logging.INFO):
            data = load_text_dataset("owner/set")
        assert "5 of 50 train rows" in caplog.text
        assert (len(data.train), len(data.validation)) == (45, 5)
        assert {row.id for row in data.train}.isdisjoint(row.id for row in data.validation)
        assert load_text_dataset("owner/set") == data

    def test_a_negative_train_label_names_its_row(self, hub) -> None:
        hub(train=(["a", "b"], [1, -1]), validation=(["c"], [1]))
        with pytest.raises(DataError, match=r"owner/set\[train\] row 1: 'label' is -1"):
            load_text_dataset("owner/set")

    def test_a_missing_column_is_named(self, hub) -> None:
        hub(train=(["a"], [1]))
        with pytest.raises(
            DataError, match=r"owner/set\[train\]: the column 'sentence' is missing \(there are \['text'"
        ):
            load_text_dataset("owner/set", text_column="sentence")

    def test_without_train_there_is_nothing_to_learn(self, hub) -> None:
        hub(test=(["a"], [1]))
        with pytest.raises(DataError, match="no 'train'"):
            load_text_dataset("owner/set")

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (ConnectionError("Couldn't reach it"), "no hub could be reached"),
            (ValueError("Config name is missing"), "cannot be read \\(Config name is missing\\)"),
        ],
    )
    def test_an_unreachable_hub_is_said_together_with_the_missing_folder(
        self, error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        datasets = pytest.importorskip("datasets", reason="the extra 'simulation' is not installed")

        def fail(name: str) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(DataError, match=rf"The folder .*{tmp_path.name}/banking7 does not exist, and .*{expected}"):
            load_text_dataset("banking7", base_dir=tmp_path)

    def test_a_missing_library_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(ConfigurationError, match=r"vflair-flower\[simulation\]"):
            load_text_dataset("owner/set")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared data sets are not at {SHARED}")
@pytest.mark.parametrize(
    ("name", "counts", "num_labels", "first_name"),
    [
        ("banking77", {"train": 8000, "validation": 1000, "test": 3080}, 77, "card_arrival"),
        ("sst2", {"train": 8000, "validation": 872}, 2, "negative"),
    ],
)
def test_shared_data_sets_load(name: str, counts: dict[str, int], num_labels: int, first_name: str) -> None:
    data = load_text_dataset(name, base_dir=SHARED / "data")
    assert {split: len(rows) for split, rows in data.splits.items()} == counts
    assert (data.num_labels, data.label_names[0]) == (num_labels, first_name)
