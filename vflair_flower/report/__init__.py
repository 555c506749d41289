"""What a run found, for people and for programs.

`result` is the schema of `result.json`, `observers` the table of who saw what, `html` the page for a manager,
`terminal` the lines at the end of a run.  All that is shown is read from `result.json`; nothing is measured here.
"""

from vflair_flower.report.html import build_report
from vflair_flower.report.observers import observer_table
from vflair_flower.report.result import (
    SCHEMA_VERSION,
    AuditRow,
    ControlTraffic,
    DataSummary,
    Interval,
    MetricSummary,
    ModelSummary,
    ObserverRow,
    PartySummary,
    PeakMemory,
    Result,
    RoundSummary,
    Seen,
    Sentence,
    TrafficEntry,
    TrafficSummary,
)
from vflair_flower.report.terminal import summary_lines

__all__ = [
    "SCHEMA_VERSION",
    "AuditRow",
    "ControlTraffic",
    "DataSummary",
    "Interval",
    "MetricSummary",
    "ModelSummary",
    "ObserverRow",
    "PartySummary",
    "PeakMemory",
    "Result",
    "RoundSummary",
    "Seen",
    "Sentence",
    "TrafficEntry",
    "TrafficSummary",
    "build_report",
    "observer_table",
    "summary_lines",
]
