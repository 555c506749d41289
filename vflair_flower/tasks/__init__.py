"""What is learnt, from whose rows, and how well: data sets, dealing to parties, batches, metrics.

It knows no model, no session and no Flower.  From the ground up:

* values: `examples`, `dataset`; where they come from: `labels`, `jsonl`, `hub`, `wording`, `messages`, `rows`, and for
  the named sets `entries`, `catalogue`, `columns`, `loading`; who has which: `dealing`;
* what a model takes: `encoded`, `texts`, `spans`, `responses`, `masking`, `images`, behind the door `encoding`; then
  `batches` and `order`;
* how good it is: `metrics`, `scores`, `answers`, `overlap`, `likelihood`, `sandbox`, `code`, behind the door `scoring`;
* what the documentation says of it: `page`.
"""

from vflair_flower.tasks.answers import FinalNumber, final_number, last_boxed, normal_math, same_math, same_number
from vflair_flower.tasks.batches import Batch, collate, padded_ids, unpadded
from vflair_flower.tasks.catalogue import CATALOGUE, task_entry
from vflair_flower.tasks.code import cut_completion, pass_at_k, run_completions, score_pass_at_k
from vflair_flower.tasks.dataset import Secret, SecretKind, TaskDataset, TextDataset
from vflair_flower.tasks.dealing import DealKind, DealSettings, deal
from vflair_flower.tasks.encoded import (
    IGNORED,
    Encoded,
    EncodedImageText,
    EncodedPair,
    EncodedRow,
    EncodedText,
    EncodedWindow,
)
from vflair_flower.tasks.encoding import encode_task
from vflair_flower.tasks.entries import HeldOut, Part, TaskEntry
from vflair_flower.tasks.examples import Example, NumberRow, PromptRow, Row, Span, SpanRow, text_of
from vflair_flower.tasks.images import encode_images
from vflair_flower.tasks.likelihood import Likelihood, likelihoods
from vflair_flower.tasks.loading import load_rows, load_task
from vflair_flower.tasks.masking import encode_texts, mask_tokens
from vflair_flower.tasks.messages import account_is_valid, generate_messages, made_up_secret
from vflair_flower.tasks.metrics import (
    Interval,
    accuracy,
    bootstrap_interval,
    majority_accuracy,
    mean_interval,
    paired_bootstrap_difference,
    seed_interval,
)
from vflair_flower.tasks.order import BatchOrder
from vflair_flower.tasks.overlap import exact_match, normal_answer, normal_vqa, rouge, span_f1, vqa_agreement
from vflair_flower.tasks.page import tasks_page
from vflair_flower.tasks.responses import encode_pairs, encode_prompts, encode_responses, prompt_tokens
from vflair_flower.tasks.rows import load_text_dataset
from vflair_flower.tasks.sandbox import Outcome, SandboxSettings, run_program
from vflair_flower.tasks.scores import Score
from vflair_flower.tasks.scoring import METRICS, score_classes, score_likelihoods, score_numbers, score_texts
from vflair_flower.tasks.spans import FoundSpan, best_spans, encode_spans
from vflair_flower.tasks.texts import encode, end_token_id, mask_token_id, padding_token_id

__all__ = [
    "CATALOGUE",
    "IGNORED",
    "METRICS",
    "Batch",
    "BatchOrder",
    "DealKind",
    "DealSettings",
    "Encoded",
    "EncodedImageText",
    "EncodedPair",
    "EncodedRow",
    "EncodedText",
    "EncodedWindow",
    "Example",
    "FinalNumber",
    "FoundSpan",
    "HeldOut",
    "Interval",
    "Likelihood",
    "NumberRow",
    "Outcome",
    "Part",
    "PromptRow",
    "Row",
    "SandboxSettings",
    "Score",
    "Secret",
    "SecretKind",
    "Span",
    "SpanRow",
    "TaskDataset",
    "TaskEntry",
    "TextDataset",
    "account_is_valid",
    "accuracy",
    "best_spans",
    "bootstrap_interval",
    "collate",
    "cut_completion",
    "deal",
    "encode",
    "encode_images",
    "encode_pairs",
    "encode_prompts",
    "encode_responses",
    "encode_spans",
    "encode_task",
    "encode_texts",
    "end_token_id",
    "exact_match",
    "final_number",
    "generate_messages",
    "last_boxed",
    "likelihoods",
    "load_rows",
    "load_task",
    "load_text_dataset",
    "made_up_secret",
    "majority_accuracy",
    "mask_token_id",
    "mask_tokens",
    "mean_interval",
    "normal_answer",
    "normal_math",
    "normal_vqa",
    "padded_ids",
    "padding_token_id",
    "paired_bootstrap_difference",
    "pass_at_k",
    "prompt_tokens",
    "rouge",
    "run_completions",
    "run_program",
    "same_math",
    "same_number",
    "score_classes",
    "score_likelihoods",
    "score_numbers",
    "score_pass_at_k",
    "score_texts",
    "seed_interval",
    "span_f1",
    "task_entry",
    "tasks_page",
    "text_of",
    "unpadded",
    "vqa_agreement",
]
