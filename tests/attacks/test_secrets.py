"""Planted secrets: what was found is counted, a model that remembers gives them away, one that never saw them not."""

import math
from dataclasses import replace

import pytest

from vflair_flower.attacks.membership.shadows import fine_tuned
from vflair_flower.attacks.secrets import (
    Exposure,
    alternatives,
    exposures,
    extracted,
    mean_exposure,
    prompt_for_secrets,
)
from vflair_flower.attacks.surrogate import Surrogate
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.partition import PartitionPlan
from vflair_flower.settings import OptimizerSettings, TaskKind, TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.tasks import PromptRow, Secret, account_is_valid, encode_task, generate_messages

KINDS = ("account", "order", "person", "sum")


@pytest.fixture(scope="module")
def planted():
    """A few made-up messages with an order number each, as texts to model, and these numbers."""
    data = generate_messages(num_train=240, num_validation=1, num_test=0, seed=4)
    secrets = {secret.row_id: secret for secret in data.secrets if secret.kind == "order"}
    rows = [row for row in data.train if row.id in secrets and row.text.find(secrets[row.id].value) > 20]
    rows = sorted(rows, key=lambda row: len(row.text))[:8]
    return [PromptRow(prompt="", response=row.text, id=row.id) for row in rows], [secrets[row.id] for row in rows]


@pytest.fixture(scope="module")
def remembers(stories, planted):
    """stories260K, as it was and after it learnt these messages by heart."""
    rows, _ = planted
    spec = SplitSpec(
        model=stories.source.location,
        task=stories.task,
        tuning=None,
        training=TrainingSettings(passes=50.0, batch_size=8, max_tokens=128),
        optimizer=OptimizerSettings(learning_rate=5e-3),
    )
    before = Surrogate(stories.source, PartitionPlan(), stories.task).whole
    encoded = encode_task(stories.task.kind, rows, stories.tokenizer, max_tokens=128)
    return before, fine_tuned(before, encoded, spec, pad_token_id=2, seed=1)


class TestExtracted:
    SECRETS = (
        Secret("order", "#483920", "a"),
        Secret("account", "AC-4821-7730-19", "b"),
        Secret("person", "Mirolan Testov", "c"),
        Secret("order", "#100200", "d"),
    )

    def test_is_the_union_over_attacks(self):
        texts = {"one": ["where is # 4839 20 ?", "nothing"], "two": ["ac - 4821 - 7730 - 19 !", "# 483920"]}
        found = extracted(texts, self.SECRETS)
        assert found.found_by == {"one": (True, False, False, False), "two": (True, True, False, False)}
        assert found.found == (True, True, False, False)
        assert (found.figure.value, found.figure.n, found.figure.chance) == (0.5, 4, 0.0)
        assert found.of_kind("order") == (1, 2)

    def test_of_no_texts_is_nothing_and_of_no_secrets_is_refused(self):
        assert extracted({}, self.SECRETS).figure.value == 0.0
        assert extracted({"one": []}, self.SECRETS).found == (False,) * 4
        with pytest.raises(DataError, match="no secrets were planted"):
            extracted({"one": ["x"]}, ())

    def test_chance_is_what_other_values_get(self):
        """A text with all sums of one digit holds every alternative, so finding the secret in it is worth nothing."""
        everything = " ".join(f"{n} euros" for n in range(10))
        found = extracted({"guess": [everything]}, (Secret("sum", "7 euros", "a"),))
        assert found.figure.value == found.figure.chance == 1.0

    def test_other_values_are_of_the_kind_and_format(self):
        data = generate_messages(num_train=240, num_validation=1, num_test=0)
        for kind in KINDS:
            for secret in [one for one in data.secrets if one.kind == kind][:6]:
                values = alternatives(secret, 30, seed=2)
                assert secret.value not in values
                assert len(set(values)) == len(values) >= 4
                assert values == alternatives(secret, 30, seed=2)
                if kind == "account":
                    assert all(account_is_valid(value) for value in values)
                if kind != "person":
                    assert {tuple(c.isdigit() for c in value) for value in values} == {
                        tuple(c.isdigit() for c in secret.value)
                    }
        assert all(value.startswith("KD") for value in alternatives(Secret("account", "KD 12-77", "a"), 9))
        with pytest.raises(DataError, match="nothing like it"):
            alternatives(Secret("order", "no digits", "a"), 5)


class TestPrompting:
    def test_a_model_that_remembers_gives_them_away_and_one_that_never_saw_them_does_not(
        self, stories, planted, remembers
    ):
        rows, secrets = planted
        before, after = remembers
        found, unseen = (
            extracted({"prompting": prompt_for_secrets(model, rows, secrets, stories.tokenizer)}, secrets)
            for model in (after, before)
        )
        assert found.figure.value >= 0.75
        assert found.figure.chance == 0.0
        assert unseen.figure.value == 0.0

    def test_what_is_asked_holds_no_secret(self, stories, planted, remembers):
        """The prompt ends before the secret, so a model that repeats its prompt shows nothing."""
        rows, secrets = planted
        _, after = remembers
        texts = prompt_for_secrets(after, rows, secrets, stories.tokenizer, more_tokens=0)
        for row, secret, text in zip(rows, secrets, texts, strict=True):
            assert row.response[: row.response.find(secret.value)].strip() not in text

    def test_refuses_classifiers_and_secrets_that_are_not_there(self, stories, planted, remembers):
        rows, secrets = planted
        model, _ = remembers
        with pytest.raises(ConfigurationError, match="goes on from a text"):
            prompt_for_secrets(model, rows, secrets, stories.tokenizer, kind=TaskKind.SEQUENCE_CLASSIFICATION)
        with pytest.raises(DataError, match="does not stand in its row"):
            prompt_for_secrets(model, rows, [replace(secrets[0], value="#000000")], stories.tokenizer)
        with pytest.raises(DataError, match="row is missing"):
            prompt_for_secrets(model, rows[1:], secrets[:1], stories.tokenizer)
        with pytest.raises(ConfigurationError, match="compared_with is 0"):
            exposures(model, rows, secrets, stories.tokenizer, compared_with=0)


class TestExposure:
    def test_is_high_for_what_was_learnt_and_chance_for_what_was_not(self, stories, planted, remembers):
        rows, secrets = planted
        before, after = remembers
        learnt, unseen = (
            exposures(model, rows, secrets, stories.tokenizer, compared_with=63, seed=3) for model in (after, before)
        )
        assert mean_exposure(learnt).value >= 5.0
        figure = mean_exposure(unseen)
        assert figure.interval.low <= figure.chance + 0.5
        assert figure.value < 3.5
        assert figure.count == len(secrets)

    def test_counts_bits_from_the_rank(self):
        secret = Secret("order", "#483920", "a")
        assert Exposure(secret=secret, rank=1, alternatives=63).bits == 6.0
        assert Exposure(secret=secret, rank=64, alternatives=63).bits == 0.0
        found = Exposure(secret=secret, rank=5, alternatives=1023)
        assert found.bits == pytest.approx(10 - math.log2(5))
        assert found.chance_bits == pytest.approx(1 / math.log(2), abs=0.01)
