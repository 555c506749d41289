"""The page of data sets says what the catalogue says, and claims real rows only where tests use them."""

from pathlib import Path

from tests.tasks.test_real_rows import FOLDERS
from vflair_flower.tasks import CATALOGUE, METRICS, tasks_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"


def test_the_page_is_made_from_the_catalogue():
    assert PAGE.read_text(encoding="utf-8") == tasks_page(), (
        "docs/tasks.md is out of date: python -c 'from vflair_flower.tasks import tasks_page as p; "
        'open("docs/tasks.md", "w", encoding="utf-8").write(p())\''
    )


def test_every_set_and_metric_stands_there():
    page = tasks_page()
    assert all(f"| `{name}` |" in page for name in (*CATALOGUE, *METRICS))


def test_real_rows_are_claimed_where_a_test_uses_them_and_nowhere_else():
    assert {name for name, entry in CATALOGUE.items() if entry.real_rows} == set(FOLDERS)
