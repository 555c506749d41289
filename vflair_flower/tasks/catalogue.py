"""The data sets: one row each, with their standard splits, prompts and metrics.

Which rows are validation is never a free choice.  GLUE, SQuAD and TextVQA hide the labels of their test part, so their
development part is what papers report, and it is `test` here; validation is then a held-out part of train, so that no
setting is chosen on rows that are reported.  Sets without parts get both from train.

Invariant: names are unique, and no set has one part as two splits.
"""

from collections.abc import Mapping
from types import MappingProxyType

from vflair_flower.errors import DataError
from vflair_flower.settings import TaskKind
from vflair_flower.tasks.entries import HeldOut, Part, TaskEntry

_GLUE = "Wang et al. 2019, ICLR (GLUE)"
_GLUE_SPLITS: Mapping[str, Part | HeldOut] = {
    "train": Part(("train",)),
    "validation": HeldOut(0.1),
    "test": Part(("validation", "dev")),
}
_INSTRUCTION_SPLITS: Mapping[str, Part | HeldOut] = {
    "train": Part(("train",)),
    "validation": HeldOut(0.05),
    "test": HeldOut(0.05),
}
_TRAIN_AND_TEST: Mapping[str, Part | HeldOut] = {
    "train": Part(("train",)),
    "validation": HeldOut(0.05),
    "test": Part(("test",)),
}
_ID = ("id", "idx", "question_id", "task_id")
_ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def _glue(
    name: str,
    title: str,
    *,
    columns: tuple[str, ...],
    label_names: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    citation: str,
    splits: Mapping[str, Part | HeldOut] = _GLUE_SPLITS,
    hub_config: str = "",
    counted: bool = True,
    note: str = "",
    real_rows: Mapping[str, int] | None = None,
) -> TaskEntry:
    texts: dict[str, tuple[str, ...]] = {
        role: (column,) for role, column in zip(("text", "pair"), columns, strict=False)
    }
    if len(columns) == 1:
        texts["text"] = (*columns, "text")
    return TaskEntry(
        name=name,
        title=title,
        hub_id="nyu-mll/glue",
        hub_config=hub_config or name,
        kind=TaskKind.SEQUENCE_CLASSIFICATION if label_names else TaskKind.SEQUENCE_REGRESSION,
        splits=splits,
        columns=texts | {"label": ("label",), "id": _ID},
        label_names=label_names,
        group=columns[:1] if len(columns) == 2 else (),  # several second texts share a first: a premise, a question
        metrics=metrics,
        citation=f"{citation}; {_GLUE}",
        counted=counted,
        note=note,
        real_rows=real_rows or {},
    )


def _instructions(
    name: str, title: str, *, hub_id: str, columns: Mapping[str, tuple[str, ...]], citation: str, note: str,
    metrics: tuple[str, ...], real_rows: Mapping[str, int],
) -> TaskEntry:  # fmt: skip
    return TaskEntry(
        name=name,
        title=title,
        hub_id=hub_id,
        kind=TaskKind.CAUSAL_LM,
        splits=_INSTRUCTION_SPLITS,
        columns=columns,
        template=_ALPACA,
        template_without_input=_ALPACA_WITHOUT_INPUT,
        response="{output}",
        group=("instruction",),
        metrics=metrics,
        citation=citation,
        note=note,
        real_rows=real_rows,
    )


def _yelp(name: str, title: str, *, hub_id: str, label_names: tuple[str, ...], counted: bool, note: str) -> TaskEntry:
    return TaskEntry(
        name=name,
        title=title,
        hub_id=hub_id,
        kind=TaskKind.SEQUENCE_CLASSIFICATION,
        splits=_TRAIN_AND_TEST,
        columns={"text": ("text",), "label": ("label",), "id": _ID},
        label_names=label_names,
        metrics=("accuracy",),
        citation="Zhang, Zhao and LeCun 2015, NeurIPS",
        counted=counted,
        note=note,
    )


_MNLI = ("entailment", "neutral", "contradiction")
_ENTAILMENT = ("entailment", "not_entailment")

_ENTRIES = (
    _glue("cola", "CoLA", columns=("sentence",), label_names=("unacceptable", "acceptable"),
          metrics=("mcc", "accuracy"), citation="Warstadt et al. 2019, TACL",
          real_rows={"train": 7678, "validation": 853, "test": 1043}),
    _glue("sst2", "SST-2", columns=("sentence",), label_names=("negative", "positive"),
          citation="Socher et al. 2013, EMNLP", note="Train rows are phrases, the others whole sentences.",
          real_rows={"train": 7200, "validation": 800, "test": 872}),
    _glue("mrpc", "MRPC", columns=("sentence1", "sentence2"), label_names=("not_equivalent", "equivalent"),
          metrics=("f1", "accuracy"), citation="Dolan and Brockett 2005, IWP"),
    _glue("qqp", "QQP", columns=("question1", "question2"), label_names=("not_duplicate", "duplicate"),
          metrics=("f1", "accuracy"), citation="Iyer et al. 2017, Quora"),
    _glue("mnli", "MNLI (matched)", columns=("premise", "hypothesis"), label_names=_MNLI,
          citation="Williams et al. 2018, NAACL",
          splits={**_GLUE_SPLITS, "test": Part(("validation_matched", "dev_matched", "validation", "dev"))}),
    _glue("mnli_mismatched", "MNLI (mismatched)", columns=("premise", "hypothesis"), label_names=_MNLI,
          citation="Williams et al. 2018, NAACL", hub_config="mnli", counted=False,
          splits={**_GLUE_SPLITS, "test": Part(("validation_mismatched", "dev_mismatched"))}),
    _glue("qnli", "QNLI", columns=("question", "sentence"), label_names=_ENTAILMENT,
          citation="Rajpurkar et al. 2016, EMNLP"),
    _glue("rte", "RTE", columns=("sentence1", "sentence2"), label_names=_ENTAILMENT,
          citation="Dagan et al. 2006 and its successors"),
    _glue("wnli", "WNLI", columns=("sentence1", "sentence2"), label_names=("not_entailment", "entailment"),
          citation="Levesque et al. 2012, KR",
          note="The reported part answers train's sentences the other way round; the majority is hard to beat."),
    _glue("stsb", "STS-B", columns=("sentence1", "sentence2"), label_names=(), metrics=("pearson", "spearman"),
          citation="Cer et al. 2017, SemEval", note="A number from 0 to 5."),
    _yelp("yelp_polarity", "Yelp (polarity)", hub_id="fancyzhx/yelp_polarity", label_names=("negative", "positive"),
          counted=True, note="Two classes; `yelp_full` has five. Figures of the two are not comparable."),
    _yelp("yelp_full", "Yelp (full)", hub_id="Yelp/yelp_review_full", counted=False, note="Five classes.",
          label_names=("1 star", "2 stars", "3 stars", "4 stars", "5 stars")),
    TaskEntry(
        name="squad", title="SQuAD 1.1", hub_id="rajpurkar/squad", kind=TaskKind.QUESTION_ANSWERING,
        splits=_GLUE_SPLITS,
        columns={"question": ("question",), "context": ("context",), "answers": ("answers",), "id": _ID},
        group=("title", "context"), metrics=("exact_match", "span_f1"),
        citation="Rajpurkar et al. 2016, EMNLP",
        note="No article is in two splits. The real rows have one answer a question, so figures read lower.",
        real_rows={"train": 4000, "validation": 1000, "test": 1190},
    ),
    TaskEntry(
        name="lambada", title="LAMBADA", hub_id="cimec/lambada", kind=TaskKind.CAUSAL_LM,
        splits={"validation": Part(("validation",)), "test": Part(("test",))},
        columns={"passage": ("text",), "context": ("context",), "target": ("target",), "id": _ID},
        template="{context}", response=" {target}", metrics=("last_word_accuracy", "word_perplexity"),
        citation="Paperno et al. 2016, ACL",
        note="For testing only; its train part is whole novels. The last word is all of its sub-words. The real rows "
             "are of OpenAI's variant, with cased and untokenised text, so figures of the two are not comparable.",
        real_rows={"test": 1000},
    ),
    _instructions(
        "alpaca", "Alpaca", hub_id="tatsu-lab/alpaca",
        columns={"instruction": ("instruction",), "input": ("input",), "output": ("output",), "id": _ID},
        metrics=("token_perplexity", "rouge1", "rouge2", "rougeL"), citation="Taori et al. 2023, Stanford Alpaca",
        note="No official metric; perplexity is of the response.",
        real_rows={"train": 960, "validation": 150, "test": 50},
    ),
    _instructions(
        "dolly", "Dolly 15k", hub_id="databricks/databricks-dolly-15k",
        columns={"instruction": ("instruction",), "input": ("context", "input"), "output": ("response", "output"),
                 "id": _ID},
        metrics=("token_perplexity", "rouge1", "rouge2", "rougeL"), citation="Conover et al. 2023, Databricks",
        note="Prompted as Alpaca. The real rows are of a mix of Dolly and HH-RLHF.",
        real_rows={"train": 854, "validation": 100, "test": 45},
    ),
    _instructions(
        "code_alpaca", "CodeAlpaca 20k", hub_id="sahil2801/CodeAlpaca-20k",
        columns={"instruction": ("instruction",), "input": ("input",), "output": ("output",), "id": _ID},
        metrics=("token_perplexity", "bleu", "rougeL"), citation="Chaudhary 2023, GitHub",
        note="It has no tests to run; code that works is measured on `humaneval` (pass@k). CodeBLEU is not computed.",
        real_rows={"train": 1724, "validation": 200, "test": 91},
    ),
    TaskEntry(
        name="math", title="MATH", hub_id="DigitalLearningGmbH/MATH-lighteval", kind=TaskKind.CAUSAL_LM,
        splits=_TRAIN_AND_TEST,
        columns={"problem": ("problem",), "solution": ("solution",), "id": _ID},
        template="Problem:\n{problem}\n\nSolution:", response=" {solution}", metrics=("math_accuracy",),
        citation="Hendrycks et al. 2021, NeurIPS",
        note="The answer is what is last in \\boxed{}; both sides are normalised, not compared as strings.",
    ),
    TaskEntry(
        name="gsm8k", title="GSM8K", hub_id="openai/gsm8k", hub_config="main", kind=TaskKind.CAUSAL_LM,
        splits=_TRAIN_AND_TEST,
        columns={"question": ("question",), "answer": ("answer",), "id": _ID},
        template="Question: {question}\nAnswer:", response=" {answer}", metrics=("gsm8k_accuracy",),
        citation="Cobbe et al. 2021, arXiv:2110.14168",
        note="The number after ####; without the mark the last number counts, and how often is said.",
        real_rows={"train": 6973, "validation": 500, "test": 1319},
    ),
    TaskEntry(
        name="textvqa", title="TextVQA", hub_id="lmms-lab/textvqa", kind=TaskKind.IMAGE_TEXT_TO_TEXT,
        splits={"train": Part(("train",)), "validation": HeldOut(0.05), "test": Part(("validation", "val"))},
        columns={"question": ("question",), "answers": ("answers",), "image": ("image",), "image_id": ("image_id",),
                 "id": ("question_id", "id")},
        template="{question}\nAnswer the question using a single word or phrase.", response=" {answer}",
        group=("image_id", "image"), metrics=("vqa_accuracy",), citation="Singh et al. 2019, CVPR",
        note="No image is in two splits. Ten answers a question; the most frequent is the one to learn.",
    ),
    TaskEntry(
        name="humaneval", title="HumanEval", hub_id="openai/openai_humaneval", kind=TaskKind.CAUSAL_LM,
        splits={"test": Part(("test",))},
        columns={"prompt": ("prompt",), "solution": ("canonical_solution",), "tests": ("test",),
                 "entry_point": ("entry_point",), "id": ("task_id", "id")},
        template="{prompt}", response="{solution}", metrics=("pass_at_1",), counted=False,
        citation="Chen et al. 2021, arXiv:2107.03374",
        note="For testing only. Runs what the model wrote, so it is off unless asked for.",
        real_rows={"test": 164},
    ),
)  # fmt: skip

CATALOGUE: Mapping[str, TaskEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""Every data set by name."""


def task_entry(name: str) -> TaskEntry:
    """Return the catalogue's row of a data set.

    Raises
    ------
    DataError
        There is none of this name.

    Examples
    --------
    >>> task_entry("cola").metrics
    ('mcc', 'accuracy')
    """
    if name not in CATALOGUE:
        raise DataError(
            f"{name!r} is not in the catalogue, so its columns and metric are unknown. Choose one of "
            f"{', '.join(CATALOGUE)}; any other set of texts and labels loads with load_text_dataset."
        )
    return CATALOGUE[name]
