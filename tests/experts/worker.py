"""Hosts of experts in processes of their own, for tests: each serves one session after another."""

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor

from vflair_flower.spec import SplitSpec

_START_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What a host needs to serve a session."""

    spec: str
    address: str
    session: str
    party: str
    parties: list[str]
    ticket: str
    deadline_s: float


class Worker:
    """One process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,), daemon=True)
        self._process.start()

    def wait_ready(self) -> None:
        assert self._pipe.poll(_START_S), "a host's process did not start"
        self._pipe.recv()

    def invite(self, invitation: Invitation) -> None:
        self._pipe.send(invitation)

    def answer(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the host's trained parameters after a session and the gradients of its first step."""
        assert self._pipe.poll(60), "a host's process did not come back from its session"
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join(10)


def first_gradients(host: Any) -> dict[str, Tensor]:
    """Let a host note the gradients that its first step is taken with; they are there once it has stepped."""
    noted: dict[str, Tensor] = {}
    step = host._update.step

    def noting(party: str, request: Any) -> None:
        if not noted:
            noted.update({name: gradient.clone() for name, gradient in host._update.pending(party).items()})
        step(party, request)

    host._update.step = noting
    return noted


def _serve(pipe: Connection) -> None:
    import torch

    from vflair_flower.experts import ExpertHost, expert_agreement, load_experts
    from vflair_flower.experts.loading import layers_and_placement
    from vflair_flower.partition import resolve_model
    from vflair_flower.partition.sources import load_config
    from vflair_flower.session import connect

    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        try:
            asked: Any = pipe.recv()
        except EOFError:
            return
        spec = SplitSpec.from_json(asked.spec)
        source = resolve_model(spec.model)
        config = load_config(source, spec.task)
        layers, placement = layers_and_placement(config, spec, asked.parties)
        own = placement.experts_of(asked.party)
        module = load_experts(source, dict(zip(layers, own, strict=True)), spec.task)
        host = ExpertHost(module, layers, own, spec, deadline_s=asked.deadline_s)
        noted = first_gradients(host)
        host.begin(asked.parties[:1], training=True)  # the first of them is the one that trains
        link = connect(
            asked.address,
            session=asked.session,
            party=asked.party,
            ticket=asked.ticket,
            agreement=expert_agreement(spec, config),
            deadline_s=asked.deadline_s,
        )
        with link:
            link.serve(host)
            host.wait_for_owners(60)
        found = (host.trained_state(), noted)
        pipe.send([{name: tensor.numpy() for name, tensor in part.items()} for part in found])
