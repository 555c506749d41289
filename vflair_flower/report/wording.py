"""The sentences that both the page and the terminal say about a result."""

from vflair_flower.report.numbers import count, counted, interval_of_difference, percent, points
from vflair_flower.report.observers import text_stayed
from vflair_flower.report.result import MetricSummary, Result

_RIGHT = {
    "accuracy": "of held-out texts right",
    "f1": "of the words of held-out answers right (F1)",
    "token-accuracy": "of held-out tokens foreseen",
}
_COMMONEST = {"accuracy": "commonest class", "token-accuracy": "commonest token"}


def shown_name(metric: MetricSummary) -> str:
    """Return the metric's name for people."""
    return {"f1": "F1", "token-accuracy": "token accuracy"}.get(metric.name, metric.name)


def commonest(metric: MetricSummary) -> str:
    """Say what the level beside the metric is the score of."""
    return _COMMONEST.get(metric.name, "commonest answer")


def headline(result: Result) -> str:
    """Say in one sentence who trained what together, and with what result."""
    metric = result.metric
    companies = len(result.data_parties)
    train = result.data.rows.get("train", sum(result.data.rows.values()))
    alone = companies == 1
    who = "One company fine-tuned" if alone else f"{count(companies)} companies fine-tuned"
    together = "with a model party" if alone else "together"
    silence = ""
    if text_stayed(result.observers):
        silence = ", without showing its text" if alone else ", none showing its text"
    unsplit = "" if metric.unsplit is None else f", unsplit {percent(metric.unsplit)}"
    guess = "" if metric.majority is None else f", guessing the {commonest(metric)} {percent(metric.majority)}"
    return (
        f"{who} {result.model.name} {together} on {counted(train, 'text')}{silence}: "
        f"{percent(metric.split)} {_RIGHT.get(metric.name, metric.name)}{unsplit}{guess}."
    )


def verdict(metric: MetricSummary) -> str:
    """Say what the figures allow to conclude, and what not."""
    says: list[str] = []
    if metric.majority is not None and metric.split_interval.low <= metric.majority:
        says.append(f"This is not clearly better than always guessing the {commonest(metric)}.")
    if metric.unsplit is None or metric.difference is None:
        says.append("No unsplit model was trained beside it, so nothing is known about what splitting cost.")
        return " ".join(says)
    above = "above" if metric.difference > 0 else "below"
    gap = f"The split model is {points(abs(metric.difference))} {above} the unsplit one"
    between = metric.difference_interval
    if metric.split == metric.unsplit:
        gap = "The split model scores exactly as the unsplit one"
    if between is None:
        says.append(f"{gap}.")
    elif between.low <= 0 <= between.high:
        says.append(
            f"{gap} ({interval_of_difference(between)}): on {counted(metric.n, 'text')}, "
            "no difference can be told from chance."
        )
    else:
        says.append(
            f"{gap} ({interval_of_difference(between)}): more than chance explains on {counted(metric.n, 'text')}."
        )
    return " ".join(says)
