"""The page of defences: its table is the registry's, and its example and its policy work as they stand."""

import re
from pathlib import Path

import pytest

from tests.privacy.house import defended
from tests.tiny import tiny_rows
from vflair_flower.errors import PolicyError
from vflair_flower.privacy import Policy
from vflair_flower.privacy.catalogue import defences_table
from vflair_flower.privacy.defence import _DEFENCES
from vflair_flower.remote.protocol import SENT_NAMES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "defences.md").read_text()


def test_the_table_is_made_from_the_registry():
    assert PAGE.endswith(defences_table())


def test_the_example_works(bert):
    (code,) = re.findall(r"```python\n# clip_numbers.py\n(.*?)```", PAGE, flags=re.DOTALL)
    try:
        exec(compile(code, "clip_numbers.py", "exec"), {"__name__": "clip_numbers"})
        with defended(bert, "clip-numbers:bound=0.25") as party:
            party.model(**party.batch(tiny_rows(0)).inputs).loss.backward()
            assert party.values("hidden")[0].abs().max() == 0.25
            assert party.values("grad")
    finally:
        _DEFENCES.by_name.pop("clip-numbers", None)


def test_the_policy_is_one_and_keeps_what_it_should(bert, tmp_path):
    (text,) = re.findall(r"```toml\n# policy.toml\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "policy.toml").write_text(text)
    policy = Policy.read(tmp_path / "policy.toml")
    policy.check_names(SENT_NAMES)
    with (
        defended(bert, "quantize:bits=4", policy=policy) as party,
        pytest.raises(PolicyError, match="at most bfloat16"),
    ):
        party.model(**party.batch(tiny_rows(0)).inputs)
