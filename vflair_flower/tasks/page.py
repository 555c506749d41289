"""The page `docs/tasks.md`, made from the catalogue, so that it cannot say anything else than what the code does.

Invariant: the same catalogue gives the same page, and every set and metric of it stands there.
"""

from vflair_flower.tasks.catalogue import CATALOGUE
from vflair_flower.tasks.entries import HeldOut, TaskEntry
from vflair_flower.tasks.scoring import METRICS

_INTRODUCTION = """\
# Tasks and data

<!-- Made by `vflair_flower.tasks.tasks_page()`; a test compares it. Change the catalogue, not this file. -->

`load_task("gsm8k")` reads a set from the Hugging Face hub, `load_task("gsm8k", source="folder")` from local files of
the same columns (`train.jsonl` and so on, one JSON object a line). Either way the splits are those below:

* **test** is what papers report. GLUE, SQuAD and TextVQA hide the labels of their test part, so it is their development
  part.
* **validation** is never rows that are reported: where the set has none left, a share of train is held out, by a hash
  of the seed, whole groups at a time (an article, an image, a first text with all its second ones), so that nothing of
  it is in train.
* A folder whose `test.jsonl` has answers is taken as its files are called.

Labels are masked over prompts and padding, rows are shuffled anew in every epoch (`BatchOrder`), and every figure comes
with its number of rows and a 95 % bootstrap interval.

"Real rows" says how many real rows of the set the tests of this project load; of these they check the splits, and
encode and score a sample of at most 64 per split (6 programs of HumanEval). They are parts of the sets, in a folder
whose own splits are kept where it has them. Nothing is said of training: trained models are reported elsewhere. "made
up" means that loader, encoding and metric were tried on rows made up in the tests. No set was read from the hub; that
is tried with a stand-in for it.
"""


def tasks_page() -> str:
    """Return the text of `docs/tasks.md`."""
    counted = [entry for entry in CATALOGUE.values() if entry.counted]
    more = [entry for entry in CATALOGUE.values() if not entry.counted]
    lines = [_INTRODUCTION, f"## The {len(counted)} sets", "", *_table(counted), "", "## Further sets", ""]
    lines += [*_table(more), "", "## Prompts", ""]
    for entry in CATALOGUE.values():
        if entry.template:
            lines += [f"**{entry.title}**", "", "```text", f"{entry.template}{entry.response}", "```", ""]
            if entry.template_without_input:
                lines += ["Where the input is blank:", "", "```text"]
                lines += [f"{entry.template_without_input}{entry.response}", "```", ""]
    lines += ["## Metrics", "", "| name | what |", "|---|---|"]
    lines += [f"| `{name}` | {what} |" for name, what in METRICS.items()]
    lines += ["", "## Notes and sources", "", "| set | note | source |", "|---|---|---|"]
    lines += [f"| {entry.title} | {entry.note or '-'} | {entry.citation} |" for entry in CATALOGUE.values()]
    return "\n".join(lines) + "\n"


def _table(entries: list[TaskEntry]) -> list[str]:
    lines = ["| name | set | task | hub | train / validation / test | prompt | metrics | real rows |", "|---" * 8 + "|"]
    for entry in entries:
        hub = f"`{entry.hub_id}`" + (f", `{entry.hub_config}`" if entry.hub_config else "")
        splits = " / ".join(_split(entry, split) for split in ("train", "validation", "test"))
        prompt = "below" if entry.template else "two texts" if entry.pair else "text"
        prompt = "question, context" if "context" in entry.columns and not entry.template else prompt
        metrics = ", ".join(f"`{name}`" for name in entry.metrics)
        real = " + ".join(f"{count:,} {split}" for split, count in entry.real_rows.items()) or "made up"
        cells = (f"`{entry.name}`", entry.title, entry.kind.value, hub, splits, prompt, metrics, real)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _split(entry: TaskEntry, split: str) -> str:
    how = entry.splits.get(split)
    if how is None:
        return "-"
    return f"{how.share:.0%} of train" if isinstance(how, HeldOut) else f"`{how.names[0]}`"
