"""A party whose steps are measured: a ClientApp for `ProcessGrid` and for Flower's own nodes.

It takes steps on made-up token ids, whose number is all that matters to memory, traffic and speed, and reports the
memory that its process needed beyond what it needs to sit idle.
"""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from vflair_flower.clients import ExpertParty, PartyRows, expert_session
from vflair_flower.tasks import PromptRow

_SAMPLE_S = 0.004


def anonymous_bytes() -> int:
    """Return the memory that this process has for itself, mapped files not counted (those are the page cache's)."""
    for line in Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else ():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


class PeakSampler:
    """Watches this process's memory inside a block; `peak_bytes` counts from what it was at the start."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._start = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._start = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes() - self._start)


def made_up_batch(config: Any, *, rows: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Return a batch of random token ids ``[rows, tokens]``."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(1, config.get_text_config().vocab_size, (rows, tokens), generator=generator)
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT}


def warm_up() -> None:
    """Load and run what every process needs once, a model of no size, so that it does not count as a model's memory."""
    config = OlmoeConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_experts=2,
        num_experts_per_tok=1, vocab_size=8,
    )  # fmt: skip
    model = OlmoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(**made_up_batch(config, rows=1, tokens=4, seed=0)).loss.backward()
    optimizer.step()


def _rows(_context: Context) -> PartyRows:
    row = PromptRow(prompt="", response="no text is needed", id="0")
    return PartyRows(train=(row,), validation=(row,))


def _own_dir(context: Context) -> Path:
    return Path(str(context.node_config["state-dir"]))


app = ClientApp()
ExpertParty(_rows, state_dir=_own_dir).register(app, train=False, evaluate=False)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take the steps that the message's configuration asks for, the first of them not timed."""
    torch.set_num_threads(1)
    warm_up()
    asked = message.content["config"]
    rows, tokens, steps = (int(asked[name]) for name in ("rows", "tokens", "steps"))  # type: ignore[arg-type]
    party = int(context.node_config["partition-id"])
    with PeakSampler() as sampler, expert_session(message, context, state_dir=_own_dir(context)) as session:
        optimizer = session.attach(session.spec.optimizer.build(session.trainable_parameters()))
        started = cpu_s = 0.0
        for step in range(steps + 1):
            batch = made_up_batch(session.model.config, rows=rows, tokens=tokens, seed=1000 * party + step)
            with session.meter.measure(batch["input_ids"].shape, step):
                loss = session.model(**batch).loss
            loss.backward()
            session.meter.release(step)
            session.weigh(rows * (tokens - 1))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 0:
                started, cpu_s = time.monotonic(), -time.process_time()
        ended = time.monotonic()
        report = session.report()
    cpu_s += time.process_time()  # what it did for others until they were done as well
    metrics = {
        f"{party}-peak-bytes": sampler.peak_bytes,
        f"{party}-started": started,
        f"{party}-ended": ended,
        f"{party}-cpu-seconds": cpu_s,
        f"{party}-loss": float(loss.detach()),
    }
    return session.reply(num_examples=rows, metrics=metrics, report=report)
