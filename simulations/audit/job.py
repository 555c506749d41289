"""The audit job: every cell at some node, then a table, a page, and a word on what is above its bound."""

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from logging import INFO
from pathlib import Path

from flwr.common.logger import log
from flwr.serverapp import Grid

from simulations.audit.settings import AuditSettings
from simulations.results import versions
from vflair_flower.attacks import load_attacks
from vflair_flower.audit import GridSettings, Subject, exceeded
from vflair_flower.audit.page import write_audit_page
from vflair_flower.errors import ConfigurationError
from vflair_flower.report import AuditRow
from vflair_flower.strategies import LeakageAudit

SCHEMA_VERSION = 1


def run_audit(grid: Grid, settings: AuditSettings, run_id: str, run_dir: Path) -> None:
    """Run the job; what it found is in ``run_dir``."""
    started = time.monotonic()
    for file in settings.files:
        load_attacks(file)
    audit = LeakageAudit(
        subject=settings.subject,
        settings=settings.grid,
        folder=run_dir,
        cells_at_once=settings.audit_cells_at_once,
    )
    outcome = audit.start(grid)
    if not outcome.results:
        name, reason = next(iter(outcome.failed.items()))
        raise ConfigurationError(f"all {len(outcome.failed)} cells of the audit failed, the first is {name}: {reason}")
    broken = exceeded(settings.bounds, outcome.results, outcome.failed)
    result = {
        "schema_version": SCHEMA_VERSION,
        "job": "audit",
        "run_id": run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_s": time.monotonic() - started,
        "settings": {name.replace("_", "-"): value for name, value in asdict(settings).items()},
        "versions": versions(),
        "audited": audit.subject.run,
        "cells": [one.to_row() for one in outcome.results],
        "failed": dict(outcome.failed),
        "exceeded": broken,
    }
    (run_dir / "result.json").write_text(json.dumps(result, indent=1))
    page = write_audit_page(run_dir / "report.html", audit.subject, outcome.results, outcome.failed)
    log(INFO, "")
    for line in broken:
        log(INFO, "Leaks    %s", line)
    log(INFO, "Report   %s", page)
    if broken:
        raise ConfigurationError(f"{len(broken)} bounds are exceeded, the first: {broken[0]}")


def audit_at_the_end(grid: Grid, attacks: str, rows: int, run_dir: Path, cells_at_once: int) -> tuple[AuditRow, ...]:
    """Attack a run that has just finished, for its report; what cannot be audited has an empty audit."""
    if not attacks.strip():
        return ()
    try:
        subject = Subject(run=str(run_dir), rows=rows)
        audit = LeakageAudit(
            subject=subject,
            settings=GridSettings(attacks=attacks),
            folder=run_dir / "audit",
            cells_at_once=cells_at_once,
        )
    except ConfigurationError as error:
        log(INFO, "no audit: %s", error)
        return ()
    log(INFO, "attacking the model that was trained, on %d of its rows", rows)
    return tuple(row for one in audit.start(grid).results if (row := one.to_report()) is not None)
