"""One look from very near: is PC-MoE exact, what memory does a party need, how fast are its two schedules.

All three run `CollaborativeMoE` over gRPC; memory and speed with each party in a process of its own.
"""

import concurrent.futures
import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from simulations.in_process import quiet_flower
from simulations.local_grid import LocalGrid, ProcessGrid
from simulations.moe.methods import WRITE, load_whole
from simulations.moe.party import PeakSampler, made_up_batch, warm_up
from vflair_flower.clients import ExpertParty, PartyRows, expert_session
from vflair_flower.clients.store import PartyStore
from vflair_flower.experts.finished import joined_experts
from vflair_flower.experts.loading import backbone_parameters
from vflair_flower.memory import ActivationMeter
from vflair_flower.partition import load_config, resolve_model
from vflair_flower.session import LinkEmulation
from vflair_flower.settings import ExpertSettings, OptimizerSettings, TrainingSettings
from vflair_flower.spec import SplitSpec
from vflair_flower.strategies import CollaborativeMoE, HubSettings
from vflair_flower.tasks import PromptRow

_STATIC_BYTES, _STEP_BYTES = 16, 8
"""Per parameter: of weights in float32 the weight, its gradient and AdamW's two averages; what AdamW needs beside these
for the parameters of the one tensor that it steps."""
_LEAN = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "262144"}
"""For glibc: what one thread frees goes back to the system instead of staying that thread's."""


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """Whether one party beside n - 1 hosts computes what the whole model does, bit for bit, in three AdamW steps."""

    parties: int
    logits: bool
    gradients: bool
    parameters: bool

    @property
    def holds(self) -> bool:
        """All of it."""
        return self.logits and self.gradients and self.parameters


def measure_exactness(
    model: str, parties: int, *, deadline_s: float, experts: ExpertSettings | None = None
) -> Exactness:
    """Train the same three steps with experts at `parties` parties and with the whole model."""
    torch.set_num_threads(1)  # products of one thread have one order
    spec = _spec(model, steps=3, rows=2, tokens=32, experts=experts)
    whole = load_whole(model).train()
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()
    batches = [made_up_batch(whole.config, rows=2, tokens=32, seed=step) for step in range(3)]
    logits, gradients = _steps(whole, spec.optimizer.build(list(whole.parameters())), batches)
    same: dict[str, bool] = {}
    app = ClientApp()
    row = PromptRow(prompt="", response="no text is needed", id="0")
    ExpertParty(lambda _: PartyRows(train=(row,), validation=(row,)), state_dir=_own_dir).register(
        app, train=False, evaluate=False
    )

    @app.train()
    def train(message: Message, context: Context) -> Message:
        with expert_session(message, context, state_dir=_own_dir(context)) as session:
            if session.party == "party-0":
                optimizer = session.attach(spec.optimizer.build(session.trainable_parameters()))
                own_logits, own_gradients = _steps(session.model, optimizer, batches)
                same["logits"] = all(torch.equal(a, b) for a, b in zip(own_logits, logits, strict=True))
                same["gradients"] = all(torch.equal(g, gradients[name]) for name, g in own_gradients.items())
        return session.reply(num_examples=1)

    with tempfile.TemporaryDirectory() as work_dir:
        nodes = [{"partition-id": i, "state-dir": f"{work_dir}/{i}"} for i in range(parties)]
        grid = LocalGrid(app, nodes)
        with quiet_flower(), _strategy(spec, parties, deadline_s) as strategy:
            strategy.start(grid)
        grid.close()
        same["parameters"] = _same_parameters(whole, spec, [Path(str(node["state-dir"])) for node in nodes])
    return Exactness(parties=parties, **same)


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Memory of the party that needs most, beyond its idle process, in bytes; and what the formula says.

    Parameters
    ----------
    parties : int
        0: the whole model in one place.
    measured : int
        Of the process.
    formula : int
        ``16 (B + X / n) + 8 M / n + A``: B parameters outside experts, X in all experts, M in the largest tensor of
        experts, n parties, A activations, as counted.
    activations : int
        A.
    """

    parties: int
    measured: int
    formula: int
    activations: int


def measure_memory(
    shape: str, parties: Sequence[int], *, rows: int, tokens: int, deadline_s: float
) -> tuple[PeakMemory, list[PeakMemory]]:
    """Measure training of an OLMoE-shaped model, whole and with experts at each number of parties.

    Gradients are checkpointed in all of them.

    Returns
    -------
    whole, split
        The whole model's peak, and for each number of parties the peak of the party that needs most.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model")
        _in_a_process(save_olmoe_shaped, shape, model)
        spec = _spec(model, steps=2, rows=rows, tokens=tokens, gradient_checkpointing=True)
        config = load_config(resolve_model(model), WRITE)
        with torch.device("meta"):
            sizes = [p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()]
        own = backbone_parameters(config, spec)

        def by_formula(count: int, activations: int) -> int:
            held = own + (sum(sizes) - own) / count
            return int(_STATIC_BYTES * held + _STEP_BYTES * max(sizes) / count + activations)

        with _environment(_LEAN):
            measured, activations = _in_a_process(_whole_peak, model, rows, tokens)
            formula = by_formula(1, activations)
            whole = PeakMemory(parties=0, measured=measured, formula=formula, activations=activations)
            found = []
            for count in parties:
                metrics, reports = _run_parties(spec, count, rows=rows, tokens=tokens, steps=2, deadline_s=deadline_s)
                activations = max(parts["activations"] for parts in reports.values())
                peaks = [int(value) for name, value in metrics.items() if name.endswith("peak-bytes")]
                formula = by_formula(count, activations)
                found.append(PeakMemory(parties=count, measured=max(peaks), formula=formula, activations=activations))
    return whole, found


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens that all parties together train on in a second, by schedule, measured in turns in one run."""

    parties: int
    tokens_per_s: dict[str, float]
    repeats: int
    delay_s: float
    cores: int
    cores_used: dict[str, float]
    """By schedule: CPU seconds of all parties over seconds; what uses all of them cannot be faster."""

    @property
    def bound(self) -> float:
        """The highest ratio that the cores allow: all of them busy, and the CPU seconds per token as measured."""
        cpu = {name: self.cores_used[name] / rate for name, rate in self.tokens_per_s.items()}
        return self.cores / cpu["concurrent"] / self.tokens_per_s["round-robin"]

    @property
    def ratio(self) -> float:
        """`concurrent` over `round-robin`."""
        return self.tokens_per_s["concurrent"] / self.tokens_per_s["round-robin"]


def measure_speed(
    model: str,
    parties: int,
    *,
    rows: int,
    tokens: int,
    steps: int,
    repeats: int,
    deadline_s: float,
    delay_s: float = 0.0,
) -> Speed:
    """Time both schedules, each `repeats` times in turn; of each the median counts.

    `delay_s` is emulated between the hub and each party: a host's answer comes twice that later.
    """
    found: dict[str, list[tuple[float, float]]] = {"concurrent": [], "round-robin": []}
    hub = HubSettings(emulate=LinkEmulation(delay_s=delay_s) if delay_s else None)
    for _ in range(repeats):
        for schedule, rates in found.items():
            spec = _spec(model, steps=steps, rows=rows, tokens=tokens, experts=ExpertSettings(schedule=schedule))
            metrics, _ = _run_parties(
                spec, parties, rows=rows, tokens=tokens, steps=steps, deadline_s=deadline_s, hub=hub
            )
            started = min(v for name, v in metrics.items() if name.endswith("-started"))
            ended = max(v for name, v in metrics.items() if name.endswith("-ended"))
            cpu_s = sum(v for name, v in metrics.items() if name.endswith("-cpu-seconds"))
            rates.append((parties * steps * rows * tokens / (ended - started), cpu_s / (ended - started)))
    middle = {name: sorted(rates)[len(rates) // 2] for name, rates in found.items()}
    return Speed(
        parties=parties,
        tokens_per_s={name: rate for name, (rate, _) in middle.items()},
        repeats=repeats,
        delay_s=delay_s,
        cores=os.cpu_count() or 1,
        cores_used={name: used for name, (_, used) in middle.items()},
    )


SHAPES = {"small": (256, 128, 1576), "medium": (512, 256, 3144)}
"""Hidden width, inner width of an expert and vocabulary: OLMoE-1B-7B at an eighth and a quarter of its width and a
quarter of its depth, so that 93 % of the parameters are experts', as there."""


def save_olmoe_shaped(shape: str, folder: str) -> None:
    """Save a model with random weights in the proportions of OLMoE-1B-7B, and a tokenizer without a vocabulary."""
    hidden, inner, vocabulary = SHAPES[shape]
    config = OlmoeConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=vocabulary,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=64,
        num_experts_per_tok=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    OlmoeForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(folder)


def _in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a new process."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for processes that are started in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _whole_peak(model: str, rows: int, tokens: int) -> tuple[int, int]:
    """Return the peak memory of training the whole model here, in a process of its own, and its activations."""
    torch.set_num_threads(1)
    warm_up()
    gc.collect()
    with PeakSampler() as sampler:
        whole = load_whole(model).train()
        whole.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in whole.parameters():  # out of the mapped file, as parties hold theirs
            parameter.data = parameter.data.clone()
        optimizer = OptimizerSettings().build(list(whole.parameters()))
        meter = ActivationMeter(whole)
        for seed in range(3):
            batch = made_up_batch(whole.config, rows=rows, tokens=tokens, seed=seed)
            with meter.measure(batch["input_ids"].shape, seed):
                loss = whole(**batch).loss
            loss.backward()
            meter.release(seed)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return sampler.peak_bytes, meter.peak_bytes


def _steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Take a step per batch; returns the logits of each, and the first gradients by name."""
    logits: list[torch.Tensor] = []
    gradients: dict[str, torch.Tensor] = {}
    for batch in batches:
        output: Any = model(**batch)
        output.loss.backward()
        logits.append(output.logits.detach().clone())
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return logits, gradients


def _run_parties(
    spec: SplitSpec,
    parties: int,
    *,
    rows: int,
    tokens: int,
    steps: int,
    deadline_s: float,
    hub: HubSettings | None = None,
) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    """Run one round in processes; returns the parties' metrics and the memory that each session counted."""
    asked = ConfigRecord({"rows": rows, "tokens": tokens, "steps": steps})
    with tempfile.TemporaryDirectory() as work_dir:
        nodes = [{"partition-id": i, "state-dir": f"{work_dir}/{i}"} for i in range(parties)]
        grid = ProcessGrid("simulations.moe.party", nodes)
        try:
            with quiet_flower(), _strategy(spec, parties, deadline_s, aggregator=_AllMetrics, hub=hub) as strategy:
                strategy.start(grid, num_rounds=1, train_config=asked)
        finally:
            grid.close()
    reports = {name: report.memory for name, report in strategy.reports.items()}
    return strategy.history[-1].train_metrics, reports


class _AllMetrics(FedAvg):
    """FedAvg that keeps every party's metrics under their own names instead of averaging them."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        metrics = [reply.content.metric_records["metrics"] for reply in replies if reply.has_content()]
        joined = {name: value for record in metrics for name, value in record.items() if name != "num-examples"}
        return None, type(metrics[0])(joined)


def _strategy(
    spec: SplitSpec,
    parties: int,
    deadline_s: float,
    *,
    aggregator: type[FedAvg] = FedAvg,
    hub: HubSettings | None = None,
) -> CollaborativeMoE:
    return CollaborativeMoE(
        spec=spec,
        aggregator=aggregator(
            fraction_evaluate=0.0, min_train_nodes=parties, min_evaluate_nodes=0, min_available_nodes=parties
        ),
        parties=parties,
        hub=hub,
        deadline_s=deadline_s,
    )


def _spec(
    model: str,
    *,
    steps: int,
    rows: int,
    tokens: int,
    experts: ExpertSettings | None = None,
    gradient_checkpointing: bool = False,
) -> SplitSpec:
    return SplitSpec(
        model=model,
        task=WRITE,
        tuning=None,
        optimizer=OptimizerSettings(learning_rate=1e-3),
        training=TrainingSettings(
            rounds=1,
            local_steps=steps,
            batch_size=rows,
            evaluation_batch_size=rows,
            max_tokens=tokens,
            gradient_checkpointing=gradient_checkpointing,
        ),
        experts=experts or ExpertSettings(),
        averaging="none",
    )


def _own_dir(context: Context) -> Path:
    return Path(str(context.node_config["state-dir"]))


def _same_parameters(whole: nn.Module, spec: SplitSpec, folders: Sequence[Path]) -> bool:
    """Whether the first party's own model and all parties' experts are the whole model's parameters."""
    states = {}
    for name, folder in ((f"party-{i}", folder) for i, folder in enumerate(folders)):
        state = PartyStore(folder / "models", job="job", party=name).load(1)
        if state is None:
            return False
        states[name] = state
    config = load_config(resolve_model(spec.model), spec.task)
    experts = joined_experts(config, spec, {name: state["host"]["trained"] for name, state in states.items()})
    expected = dict(whole.named_parameters())
    found = {**states["party-0"]["own"], **experts}
    return all(torch.equal(expected[name], tensor) for name, tensor in found.items())
