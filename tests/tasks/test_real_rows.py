"""Real rows of every set that is here: load, encode, and score; a perfect answer gets full marks, a blind one does not.

`docs/tasks.md` claims real rows for exactly these sets.
"""

import pytest
import torch

from tests.tasks.words import bert, gpt2
from vflair_flower.settings import TaskKind
from vflair_flower.tasks import (
    CATALOGUE,
    IGNORED,
    PromptRow,
    Row,
    SandboxSettings,
    SpanRow,
    best_spans,
    collate,
    encode_spans,
    encode_task,
    final_number,
    likelihoods,
    load_task,
    prompt_tokens,
    run_completions,
    score_classes,
    score_likelihoods,
    score_pass_at_k,
    score_texts,
    text_of,
)
from vflair_flower.tasks.scoring import METRICS

FOLDERS = {
    "cola": "cola",
    "sst2": "sst2",
    "squad": "squad",
    "lambada": "lambada",
    "alpaca": "alpaca",
    "dolly": "dolly_hhrlhf",
    "code_alpaca": "code_alpaca",
    "gsm8k": "gsm8k",
    "humaneval": "humaneval",
}
_CLASSES = ("accuracy", "f1", "mcc")
_LIKELIHOODS = ("last_word_accuracy", "word_perplexity", "token_perplexity")


def loaded(name, shared, **settings):
    return load_task(name, source=shared / "data" / FOLDERS[name], **settings)


@pytest.mark.parametrize("name", FOLDERS)
def test_splits_are_whole_and_share_nothing(name, shared):
    data = loaded(name, shared)
    assert {split: len(rows) for split, rows in data.splits.items()} == dict(CATALOGUE[name].real_rows)
    texts = {split: {text_of(row) for row in rows} for split, rows in data.splits.items()}
    assert not texts.get("validation", set()) & texts["test"]
    assert not texts.get("validation", set()) & texts.get("train", set())
    assert not texts.get("train", set()) & texts["test"]


@pytest.mark.parametrize("name", FOLDERS)
def test_rows_become_batches(name, shared):
    data = loaded(name, shared, max_rows=64)
    tokenizer = (gpt2 if data.kind.writes else bert)(shared)
    rows = [row for split in data.splits.values() for row in split]
    encoded = encode_task(data.kind, rows, tokenizer, max_tokens=128)
    assert {one.row_id for one in encoded} == {row.id for row in rows}
    batch = collate(encoded, pad_token_id=0)
    assert batch.input_ids.shape[1] <= 128
    assert int(batch.input_ids.max()) < len(tokenizer)
    if data.kind.writes:
        assert ((batch.labels != IGNORED).sum(1) > 0).all()
        for one in encoded:
            assert all(label == IGNORED for label in one.labels[: prompt_tokens(one)])
            assert one.labels[prompt_tokens(one) :] == one.input_ids[prompt_tokens(one) :]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_metrics_tell_a_perfect_answer_from_a_blind_one(name, shared):
    data = loaded(name, shared, max_rows=60)
    names = CATALOGUE[name].metrics
    assert set(names) <= set(METRICS)
    rows = data.test
    if data.kind is TaskKind.SEQUENCE_CLASSIFICATION:
        assert all(isinstance(row, Row) for row in rows)
        labels = [row.label for row in rows]
        train = [row.label for row in data.train]
        perfect = score_classes(names, labels, labels, num_labels=data.num_labels, train_labels=train)
        blind = score_classes(names, [0] * len(labels), labels, num_labels=data.num_labels, train_labels=train)
    elif isinstance(rows[0], SpanRow):
        perfect = score_texts(names, [row.answers[0].text for row in rows], rows)
        blind = score_texts(names, [row.context.split()[0] for row in rows], rows)
    else:
        texts = [name for name in names if name not in (*_LIKELIHOODS, "pass_at_1")]
        perfect = score_texts(texts, [row.response for row in rows], rows)
        blind = score_texts(texts, ["the number 0"] * len(rows), rows)
    for good, bad in zip(perfect, blind, strict=True):
        # A response of one word has no pair of words, hence ROUGE-2 of 0 even with itself.
        least = 0.9 if good.name == "rouge2" else 1.0
        assert good.value / (100.0 if good.name == "bleu" else 1.0) == pytest.approx(1.0, abs=1.001 - least), good
        assert bad.value < 0.7 * good.value, bad
        assert good.count == bad.count == len(rows)


def test_every_gsm8k_answer_has_a_number_after_the_mark(shared):
    data = loaded("gsm8k", shared)
    numbers = [final_number(row.response) for rows in data.splits.values() for row in rows]
    assert len(numbers) == 8792
    assert all(number is not None and number.marked for number in numbers)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_squad_answers_survive_windows_and_back(make, shared):
    data = loaded("squad", shared)
    rows = [row for split in data.splits.values() for row in split[:300]]
    tokenizer = make(shared)
    windows = encode_spans(rows, tokenizer, max_tokens=192, doc_stride=64)
    assert len(windows) > len(rows)  # some contexts need several
    starts, ends = [], []
    for window in windows:
        for logits, place in ((starts, window.start_position), (ends, window.end_position)):
            logits.append(torch.zeros(len(window.input_ids)))
            logits[-1][place] = 1.0 if place == window.no_answer else 5.0
    found = best_spans(rows, windows, starts, ends, max_answer_tokens=80)
    scores = score_texts(["exact_match", "span_f1"], [found[row.id].text for row in rows], rows)
    # Where a token reaches over an answer's end, such as "1990s" for "1990", the span is the token's.
    assert scores[0].value > 0.985
    assert scores[1].value > 0.992


def test_lambada_by_the_small_model(shared, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.stories import save_stories
    from vflair_flower.tasks import encode_responses

    folder = save_stories(shared / "models" / "stories260K", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    rows = loaded("lambada", shared, max_rows=48).test
    encoded = encode_responses(rows, tokenizer, max_tokens=384, add_end=False)
    for row, one in zip(rows, encoded, strict=True):
        said = tokenizer.decode([label for label in one.labels if label != IGNORED])
        assert said == row.response.lstrip(" ") or said == row.response
    found = []
    with torch.no_grad():
        for start in range(0, len(encoded), 8):
            batch = collate(encoded[start : start + 8], pad_token_id=0)
            found += likelihoods(model(**{k: v for k, v in batch.inputs.items() if k != "labels"}).logits, batch)
    accuracy, word, token = score_likelihoods(list(_LIKELIHOODS), found)
    assert accuracy.count == 48
    assert 0.0 <= accuracy.value < 0.5
    assert 1 < token.value < 512 < word.value  # better than guessing a token of 512, and a word is several


def test_held_out_perplexity_of_instructions_by_the_small_model(shared, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.stories import save_stories

    folder = save_stories(shared / "models" / "stories260K", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    for name in ("alpaca", "dolly", "code_alpaca"):
        rows = loaded(name, shared, max_rows=8).test
        assert all(isinstance(row, PromptRow) for row in rows)
        batch = collate(encode_task(TaskKind.CAUSAL_LM, rows, tokenizer, max_tokens=256), pad_token_id=0)
        with torch.no_grad():
            output = model(**batch.inputs)
        (score,) = score_likelihoods(["token_perplexity"], likelihoods(output.logits, batch))
        assert score.value == pytest.approx(float(output.loss.exp()), rel=1e-3)


def test_humaneval_solutions_pass_and_stubs_fail(shared):
    rows = loaded("humaneval", shared).test[:6]
    allowed = SandboxSettings(allow_generated_code=True, timeout_s=20.0)
    outcomes = run_completions(rows, [[row.response, "    pass\n"] for row in rows], settings=allowed)
    assert [[one.passed for one in row] for row in outcomes] == [[True, False]] * 6
    assert score_pass_at_k(outcomes).value == 0.5
