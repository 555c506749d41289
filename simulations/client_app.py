"""The Flower ClientApp: a node is a data party or the model party of the main job, or works on cells of PC-MoE's."""

import os
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from simulations.audit.settings import AuditSettings
from simulations.bench.job import ACTION, answer_bench
from simulations.jobs import read_job
from simulations.moe.job import CELL, answer_cell
from simulations.rows import rows_of_party
from simulations.settings import JobSettings
from vflair_flower.audit.subject import PARTIES
from vflair_flower.clients import Auditor, DataParty, ModelParty, PartyRows, role_of
from vflair_flower.clients.secure import answer_stage, masked
from vflair_flower.control import HELLO, MODEL_PARTY_ROLE, SECAGG, SERVE
from vflair_flower.privacy import Policy
from vflair_flower.session import RecordingSettings


def _settings(context: Context) -> JobSettings:
    return JobSettings.from_run_config(context.run_config)


def _rows(context: Context) -> PartyRows:
    return rows_of_party(_settings(context), int(context.node_config["partition-id"]))


def _state_dir(context: Context) -> Path:
    return _settings(context).runs_dir / PARTIES


def _base_dir(context: Context) -> Path:
    return _settings(context).base


def _threads(context: Context) -> int:
    return _settings(context).threads


def _body_threads(context: Context) -> int:
    return _settings(context).body_threads


def _audit_threads(context: Context) -> int:
    job = read_job(context.run_config)
    at_once = job.audit_cells_at_once if isinstance(job, AuditSettings) else 1
    return max(1, (os.cpu_count() or 1) // at_once)


def _attack_files(context: Context) -> str:
    job = read_job(context.run_config)
    return ",".join(map(str, job.files)) if isinstance(job, AuditSettings) else ""


def _record(context: Context) -> RecordingSettings | None:
    recording = _settings(context).recording()
    return None if recording is None else replace(recording, adversaries=())  # the truth alone; the hub has the rest


def _policy(context: Context) -> Policy | None:
    return _settings(context).read_policy()


data_party = DataParty(
    _rows, state_dir=_state_dir, base_dir=_base_dir, threads=_threads, record=_record, policy=_policy
)
model_party = ModelParty(state_dir=_state_dir, base_dir=_base_dir, threads=_body_threads)

app = ClientApp()


@app.query(HELLO)
def hello(message: Message, context: Context) -> Message:
    """Say who this node is."""
    party = model_party if role_of(context) == MODEL_PARTY_ROLE else data_party
    return party.hello(message, context)


app.query(CELL)(answer_cell)
app.query(ACTION)(answer_bench)
Auditor(threads=_audit_threads, attack_files=_attack_files).register(app)
app.query(SECAGG)(answer_stage)
app.train(mods=[masked])(data_party.train)
app.evaluate()(data_party.evaluate)
app.train(SERVE)(model_party.serve)
