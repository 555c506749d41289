"""The small real model: its tokenizer is llama2.c's, and its greedy text is the published one."""

import heapq
import itertools
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.stories import read_pieces, save_stories, stories_tokenizer


@pytest.fixture(scope="module")
def stories(shared, tmp_path_factory):
    return save_stories(shared / "models" / "stories260K", tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def tokenizer(shared):
    return stories_tokenizer(shared / "models" / "stories260K")


@pytest.fixture(scope="module")
def reference(shared):
    return json.loads((shared / "models" / "stories260K" / "reference.json").read_text())


def encoded_by_score(text: str, scores: dict[str, tuple[int, float]]) -> list[int]:
    """Encode as llama2.c does, written plainly: merge the best-scored neighbours until none are left."""
    pieces = []
    for character in " " + text:
        pieces += [character] if character in scores else [f"<0x{byte:02X}>" for byte in character.encode()]
    while True:
        best = heapq.nlargest(
            1,
            (
                (scores[one + two][1], -place)
                for place, (one, two) in enumerate(itertools.pairwise(pieces))
                if one + two in scores
            ),
        )
        if not best:
            return [1] + [scores[piece][0] for piece in pieces]
        place = -best[0][1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def test_greedy_text_is_the_published_one(stories, reference):
    model = AutoModelForCausalLM.from_pretrained(stories, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories, local_files_only=True)
    wanted = reference["greedy_from_bos"]
    with torch.no_grad():
        found = model.generate(
            torch.tensor([[1]]), attention_mask=torch.ones(1, 1, dtype=torch.int64), do_sample=False,
            max_new_tokens=len(wanted["ids"]) - 1, pad_token_id=0,
        )[0].tolist()  # fmt: skip
    assert found == wanted["ids"]
    assert tokenizer.decode(found, skip_special_tokens=True) == wanted["text"]


def test_the_probe_has_the_reference_ids_and_loss(stories, reference):
    model = AutoModelForCausalLM.from_pretrained(stories, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories, local_files_only=True)
    probe = reference["probe"]
    ids = tokenizer(probe["text"])["input_ids"]
    assert ids == probe["ids"]
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert float(loss) == pytest.approx(probe["mean_nll_nats"], abs=1e-4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<>"), min_size=1, max_size=40))
def test_any_text_survives_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_encoding_is_that_of_the_scores(tokenizer, shared, reference):
    pieces = read_pieces(shared / "models" / "stories260K" / "tok512.bin")
    scores = {piece: (index, score) for index, (piece, score) in enumerate(pieces)}
    rows = (shared / "data" / "lambada" / "test.jsonl").read_text(encoding="utf-8").split("\n")[:60]
    texts = [reference["greedy_from_bos"]["text"], *(json.loads(row)["context"] for row in rows)]
    texts += ["naïve café – 東京 🙂", "  two  spaces ", "aaaa theththe", "\n\n", "MAX3.14"]
    for text in texts:
        assert tokenizer(text)["input_ids"] == encoded_by_score(text, scores), text
