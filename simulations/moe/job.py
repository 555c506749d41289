"""The PC-MoE job: first what is measured from near, then every cell at some node, then `result.json` and its page.

A finished cell is a line of `cells.jsonl`, so a run that broke off goes on with those that are missing.  A cell that
fails is reported and the others go on; the run then ends with an error that names it.
"""

import json
import math
import time
from dataclasses import asdict
from datetime import UTC, datetime
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from simulations.moe.cells import Cell, CellResult, cells_of, run_cell
from simulations.moe.measures import measure_exactness, measure_memory, measure_speed
from simulations.moe.page import write_page
from simulations.moe.settings import MoeSettings
from simulations.moe.table import summary_lines, table_of
from simulations.moe.texts import load_texts, pretraining_text
from simulations.pretraining import PretrainSettings, pretrain
from simulations.results import point_latest, versions
from vflair_flower.audit.experts import ROWS, write_rows
from vflair_flower.errors import CheckpointError, ConfigurationError
from vflair_flower.partition import load_config, resolve_model
from vflair_flower.settings import TaskKind, TaskSettings
from vflair_flower.strategies.cells import run_cells

CELL = "cell"
"""The message type's action: ``query.cell``."""
SCHEMA_VERSION = 1
_MEMORY_ROWS, _MEMORY_TOKENS = 2, 64
_SPEED_ROWS, _SPEED_TOKENS, _SPEED_STEPS = 4, 64, 6
_SPEED_DELAYS_S = (0.0, 0.02)
_MODELS = ".models"


def answer_cell(message: Message, context: Context) -> Message:
    """Run the cell that a message asks for, at a node."""
    import os

    import torch

    settings = MoeSettings.from_run_config(context.run_config)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.moe_cells_at_once))
    asked = message.content["config"]
    cell = Cell(**json.loads(str(asked["cell"])))
    result = run_cell(cell, settings, str(asked["model"]))
    return Message(RecordDict({"result": ConfigRecord({"result": result.to_json()})}), reply_to=message)


def run_moe(grid: Grid, settings: MoeSettings, run_id: str, run_dir: Path) -> None:
    """Run the job; what it found is in ``run_dir``."""
    started = time.monotonic()
    load_texts(settings.data_dir, settings.moe_rows, settings.moe_held_out_rows)
    done = _done(settings, run_dir)
    model = _model(settings)
    measured = _measured(settings, model, run_dir)
    cells = cells_of(settings)
    failed = _run_cells(grid, settings, model, [cell for cell in cells if cell not in done], done, run_dir)
    if failed:
        name, reason = next(iter(failed.items()))
        raise ConfigurationError(
            f"{len(failed)} of {len(cells)} cells failed, the first is {name}: {reason}. The others are kept; mend the "
            f'cause and go on with resume="{run_id}".'
        )
    results = [done[cell] for cell in cells]
    config = load_config(resolve_model(model), TaskSettings(kind=TaskKind.CAUSAL_LM))
    result = {
        "schema_version": SCHEMA_VERSION,
        "job": "moe",
        "run_id": run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_s": time.monotonic() - started,
        "settings": {name.replace("_", "-"): value for name, value in asdict(settings).items()},
        "versions": versions(),
        "model": {"name": Path(model).name, "family": config.model_type, **_pretraining(model)},
        "moe": {**measured, **_traffic(results)},
        "table": table_of(results),
        "cells": [asdict(one) for one in results],
    }
    (run_dir / "result.json").write_text(json.dumps(result, indent=1))
    _leave_rows(settings, model, run_dir)
    page = write_page(result, run_dir / "report.html")
    point_latest(run_dir)
    log(INFO, "")
    for line in summary_lines(result, page):
        log(INFO, line)


def _leave_rows(settings: MoeSettings, model: str, run_dir: Path) -> None:
    """Leave what audits of this job attack: the first party's texts of the first seed."""
    texts = load_texts(settings.data_dir, settings.moe_rows, settings.moe_held_out_rows)
    write_rows(
        run_dir / ROWS,
        model=model,
        victims=texts.dealt(max(settings.parties), settings.partitions[0], settings.seeds[0])[0],
        auxiliary=texts.all_held_out,
        max_tokens=settings.moe_max_tokens,
    )


def _done(settings: MoeSettings, run_dir: Path) -> dict[Cell, CellResult]:
    """Return the cells that a resumed run has, after a look at whether it is the same job."""
    kept = {name: value for name, value in asdict(settings).items() if name not in _MAY_CHANGE}
    file, cells = run_dir / "settings.json", run_dir / "cells.jsonl"
    if settings.resume:
        before = json.loads(file.read_text()) if file.is_file() else {}
        changed = sorted(name for name in kept if before.get(name) != kept[name])
        if changed:
            name = changed[0]
            raise CheckpointError(
                f"{name.replace('_', '-')} is {kept[name]!r}, and the run to go on with had {before.get(name)!r}. "
                "Resume with the same settings, or start a new run."
            )
    else:
        cells.unlink(missing_ok=True)
        file.write_text(json.dumps(kept))
    lines = cells.read_text().splitlines() if cells.is_file() else []
    found = [CellResult.from_json(line) for line in lines]
    return {one.cell: one for one in found}


_MAY_CHANGE = ("run_id", "resume", "moe_cells_at_once", "deadline_s", "base_dir", "runs")


def _model(settings: MoeSettings) -> str:
    """Return the model's folder or id; without one, pretrain a small one, once for the same settings."""
    if settings.moe_model:
        source = resolve_model(settings.moe_model, settings.base)
        return source.location
    steps = settings.moe_pretraining_steps
    texts = (settings.base / settings.moe_pretraining_texts).resolve() if settings.moe_pretraining_texts else None
    what = texts.name if texts else f"{settings.data_dir.name if settings.data_dir else 'messages'}-{settings.moe_rows}"
    folder = settings.runs_dir / _MODELS / f"moe-{what}-{steps}"
    if not (folder / "pretraining.json").is_file():
        log(INFO, "pretraining a small mixture-of-experts model, %d steps, once", steps)
        if texts is None:
            texts = folder.with_name(f"{folder.name}-texts")
            texts.mkdir(parents=True, exist_ok=True)
            rows = load_texts(settings.data_dir, settings.moe_rows, settings.moe_held_out_rows)
            for split in ("train", "validation"):
                (texts / f"{split}.txt").write_text(pretraining_text(rows, split), encoding="utf-8")
        perplexity = pretrain(texts, folder, PretrainSettings(steps=steps))
        log(INFO, "perplexity %.1f per token of its own held-out text", perplexity)
    return str(folder)


def _pretraining(model: str) -> dict[str, Any]:
    file = Path(model) / "pretraining.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return {"pretraining": known or None}


def _measured(settings: MoeSettings, model: str, run_dir: Path) -> dict[str, Any]:
    """Measure exactness, memory and speed, or take what the run that is resumed had measured."""
    file = run_dir / "measured.json"
    if settings.resume and file.is_file():
        before: dict[str, Any] = json.loads(file.read_text())
        return before
    deadline_s = settings.deadline_s
    exact = []
    for count in settings.parties:
        exact.append(measure_exactness(model, count, deadline_s=deadline_s))
        log(INFO, "exact with %d parties: %s", count, exact[-1].holds)
    found: dict[str, Any] = {
        "exact": all(one.holds for one in exact),
        "exactness": [asdict(one) for one in exact],
        "peak_memory_reduction": {},
        "memory": None,
        "tokens_per_s": {},
        "speed": [],
    }
    several = [count for count in settings.parties if count > 1]
    if settings.moe_memory_shape != "none" and several:
        whole, split = measure_memory(
            settings.moe_memory_shape, several, rows=_MEMORY_ROWS, tokens=_MEMORY_TOKENS, deadline_s=deadline_s
        )
        found["memory"] = {"whole": asdict(whole), "split": [asdict(one) for one in split]}
        for one in split:
            reduction = 1 - one.measured / whole.measured
            found["peak_memory_reduction"][str(one.parties)] = reduction
            log(
                INFO,
                "peak memory per party at %d parties: %.1f %% below the unsplit model's",
                one.parties,
                100 * reduction,
            )
    if several and settings.moe_speed_repeats:
        count = 4 if 4 in several else several[-1]
        for delay_s in _SPEED_DELAYS_S:
            speed = measure_speed(
                model,
                count,
                rows=_SPEED_ROWS,
                tokens=_SPEED_TOKENS,
                steps=_SPEED_STEPS,
                repeats=settings.moe_speed_repeats,
                deadline_s=deadline_s,
                delay_s=delay_s,
            )
            found["speed"].append({**asdict(speed), "ratio": speed.ratio, "bound": speed.bound})
            said = {name: round(rate) for name, rate in speed.tokens_per_s.items()}
            log(INFO, "tokens per second at %d parties, %g ms away: %s", count, 1000 * delay_s, said)
        found["tokens_per_s"] = found["speed"][0]["tokens_per_s"]
    file.write_text(json.dumps(found))
    return found


def _traffic(results: list[CellResult]) -> dict[str, Any]:
    """Return the bytes per token of PC-MoE by number of parties, and those of four parties (or the most)."""
    by_parties: dict[str, list[float]] = {}
    for one in results:
        if one.method == "pc-moe" and one.parties > 1:
            by_parties.setdefault(str(one.parties), []).append(one.bytes_per_token)
    means = {parties: math.fsum(values) / len(values) for parties, values in by_parties.items()}
    most = list(means.values())[-1] if means else None
    return {"bytes_per_token": means.get("4", most), "bytes_per_token_by_parties": means}


def _run_cells(
    grid: Grid, settings: MoeSettings, model: str, cells: list[Cell], done: dict[Cell, CellResult], run_dir: Path
) -> dict[str, str]:
    """Run cells at nodes, some at once; returns those that failed and why."""
    failed: dict[str, str] = {}
    total = len(cells) + len(done)

    def keep(cell: Cell, content: RecordDict) -> None:
        result = CellResult.from_json(str(content["result"]["result"]))
        done[cell] = result
        with (run_dir / "cells.jsonl").open("a") as file:
            file.write(result.to_json() + "\n")
        figures = (len(done), total, cell.name, result.perplexity, result.seconds)
        log(INFO, "%d/%d  %-36s perplexity %.1f  %.0f s", *figures)

    def fail(cell: Cell, reason: str) -> None:
        failed[cell.name] = reason
        log(WARNING, "cell %s failed: %s", cell.name, reason)

    run_cells(
        grid,
        cells,
        action=CELL,
        ask=lambda cell: {"cell": json.dumps(asdict(cell)), "model": model},
        at_once=settings.moe_cells_at_once,
        on_done=keep,
        on_failed=fail,
    )
    return failed
