"""Audits: which attack gets what out of a finished run, cell by cell, beside its chance level.

From the ground up: `cells` (what is asked and what came out), `subject` and `experts` (the run, its models and rows),
`stage` (what an adversary sees and knows at a cell), `run` (one cell), `gate` (bounds that may not be exceeded).
Attacks are in `vflair_flower.attacks`; Flower jobs that run cells are `vflair_flower.strategies.LeakageAudit`.
"""

from vflair_flower.audit.book import AuditBook
from vflair_flower.audit.cells import Cell, CellResult, GridSettings, cells_of
from vflair_flower.audit.experts import ExpertSubject
from vflair_flower.audit.gate import Bounds, exceeded
from vflair_flower.audit.run import run_cell
from vflair_flower.audit.subject import Subject
from vflair_flower.audit.subjects import open_subject, read_subject

__all__ = [
    "AuditBook",
    "Bounds",
    "Cell",
    "CellResult",
    "ExpertSubject",
    "GridSettings",
    "Subject",
    "cells_of",
    "exceeded",
    "open_subject",
    "read_subject",
    "run_cell",
]
