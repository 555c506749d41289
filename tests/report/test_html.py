"""The page: whole without network or script, for every shape of result, and safe from what names contain."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from tests.report.samples import entries, extreme_result, full_result, minimal_result
from vflair_flower.errors import ConfigurationError
from vflair_flower.report import Sentence, build_report, observer_table
from vflair_flower.report.audits import shown_sentence
from vflair_flower.report.html import render

HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}$x_{1}$ --> </style>"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects elements and checks that they close."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.open = []
        self.words = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def values(self, name):
        return [attrs[name] for _, attrs in self.elements if name in attrs]


def hostile_result():
    base = full_result()
    return full_result(
        run_id=HOSTILE,
        settings={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        model=dataclasses.replace(base.model, name=HOSTILE, family=HOSTILE, tuning=HOSTILE),
        data=dataclasses.replace(base.data, name=HOSTILE, partition=HOSTILE),
        metric=dataclasses.replace(base.metric, name=HOSTILE),
        parties=tuple(dataclasses.replace(party, name=HOSTILE, owns=HOSTILE) for party in base.parties),
        rounds=tuple(
            dataclasses.replace(item, lost_parties=(HOSTILE,), seconds={HOSTILE: 1.0}) for item in base.rounds
        ),
        observers=tuple(
            dataclasses.replace(row, observer=HOSTILE, tensor=HOSTILE, allows=HOSTILE, uncovered=HOSTILE)
            for row in base.observers
        ),
    )


RESULTS = {
    "full": full_result,
    "minimal": minimal_result,
    "extreme": extreme_result,
    "no rounds": lambda: full_result(rounds=()),
    "ht": lambda: full_result(
        model=dataclasses.replace(full_result().model, partition="HT", body_blocks=5, tail_blocks=0)
    ),
    "hostile": hostile_result,
}


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_a_page_is_well_formed_and_self_contained(make, tmp_path):
    make().write(tmp_path / "result.json")
    path = build_report(tmp_path)
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not page.values("src")
    assert all(target.startswith("#") for target in page.values("href") + page.values("xlink:href"))
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    idents = page.values("id")
    assert len(idents) == len(set(idents))
    used = page.values("href") + [f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", text)]
    assert {target[1:] for target in used} <= set(idents)


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_no_figure_shows_how_it_was_stored(make):
    text = Page(render(make())).text
    for word in ("nan", "None ", "inf ", "Undefined", "0x"):
        assert f" {word}" not in text


def test_names_are_text_and_never_markup():
    text = render(hostile_result())
    assert "<script" not in text
    assert "</style> " not in text
    page = Page(text)
    assert HOSTILE in page.text, "shown as it is, templates inside it not run"


def test_the_headline_says_it_in_one_sentence():
    page = Page(render(full_result()))
    heading = (
        "4 companies fine-tuned MiniLM together on 2,400 texts, none showing its text: 96.1 % of held-out texts right"
    )
    assert heading in page.text
    assert "unsplit 96.3 %, guessing the commonest class 14.0 %." in page.text


def test_without_a_baseline_nothing_is_said_about_it():
    text = Page(render(minimal_result())).text
    assert "Trained unsplit" not in text
    assert "nothing is known about what splitting cost" in text
    assert "not clearly better than always guessing" in text
    assert "none showing its text" not in text, "without an observer table, no such claim"
    assert "Treat everything that was sent as known to all" in text


def test_what_is_not_protected_is_said_in_words():
    text = Page(render(full_result())).text
    assert "What is not protected" in text
    assert "model party can reconstruct much of the text" in text


def test_text_that_left_is_not_called_hidden():
    rows = observer_table(
        entries(), partition="HBT", num_blocks=6, head_blocks=1, tail_blocks=1, tls=True, text_stays=False
    )
    text = Page(render(full_result(observers=rows))).text
    assert "none showing its text" not in text
    assert "read the text itself" in text


def test_lost_parties_are_named():
    text = Page(render(extreme_result())).text
    assert "Round 31 went on without Company number 00" in text
    assert "All 60 rounds" in text


def test_curves_have_text_and_their_own_ids():
    page = Page(render(full_result()))
    assert sum(tag == "svg" for tag, _ in page.elements) == 3
    assert sum(tag == "text" for tag, _ in page.elements) > 20
    assert {ident.split("-")[0] for ident in page.values("id")} == {"loss", "metric", "time"}


def test_the_same_result_gives_the_same_page():
    assert render(full_result()) == render(full_result())


def test_a_folder_without_result_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"result\.json"):
        build_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_says_what_attacks_made_of_it():
    text = Page(render(full_result())).text
    assert "What attacks made of it" in text
    assert "93.0 %" in text
    assert "by chance 2.0 %" in text
    assert "7 of 9 planted secrets came out word for word" in text
    assert "my card <b>4711</b> is gone" in text, "a text is text, whatever stands in it"
    assert "nothing" in text
    assert "What attacks made of it" not in Page(render(minimal_result())).text


def test_marks_words_that_stand_in_the_text_at_their_turn():
    found = shown_sentence(Sentence(true="a b c d", found="a x c d"))
    assert found.words == (("a", True), ("x", False), ("c", True), ("d", True))
