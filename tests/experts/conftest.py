"""Companies in one process that train a tiny mixture-of-experts model together, joined by a hub."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.writers import save_writer
from vflair_flower.certificate import TINY
from vflair_flower.experts import (
    ExpertCaller,
    ExpertChannel,
    ExpertHost,
    Placement,
    expert_agreement,
    load_backbone,
    load_experts,
    num_experts,
    tune_experts,
    tune_own,
)
from vflair_flower.experts.blocks import LentChannel
from vflair_flower.experts.finished import joined_experts
from vflair_flower.experts.handoff import HandOff, hands_off
from vflair_flower.experts.leads import Lead
from vflair_flower.experts.loading import layers_and_placement
from vflair_flower.experts.recompute import checkpoint_owner
from vflair_flower.partition import ModelSource, resolve_model
from vflair_flower.partition.sources import load_config
from vflair_flower.session import Hub
from vflair_flower.settings import (
    ExpertSettings,
    OptimizerSettings,
    TaskKind,
    TaskSettings,
    TrainingSettings,
)
from vflair_flower.spec import SplitSpec

WRITE = TaskSettings(kind=TaskKind.CAUSAL_LM)
MOE = ("mixtral", "olmoe", "qwen3-moe", "deepseek-v2", "deepseek-v3", "gpt-oss")
DEADLINE_S = 20.0


@dataclass(kw_only=True)
class Company:
    """One party of an open session."""

    name: str
    model: nn.Module
    host: ExpertHost
    caller: ExpertCaller
    optimizer: torch.optim.Optimizer
    lead: Lead | None = None
    handing: HandOff | None = None

    def train(self, batch: dict[str, Tensor], step: int = 0) -> float:
        self.optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        if self.lead is not None:
            self.lead.add_gradients()
        self.optimizer.step()
        self.caller.step(step=step, total_steps=0)
        return float(loss.detach())


@dataclass(kw_only=True)
class House:
    """A job: `with house.open(4) as companies`."""

    spec: SplitSpec
    source: ModelSource

    def placement(self, names: list[str]) -> Placement:
        return layers_and_placement(load_config(self.source, self.spec.task), self.spec, names)[1]

    def whole(self) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.source.location, dtype=self.spec.weights.torch_dtype)
        for p in model.parameters():
            p.data = p.data.clone()
        return model.train()

    @contextlib.contextmanager
    def open(self, count: int, *, training: bool = True, deadline_s: float = DEADLINE_S) -> Iterator[list[Company]]:
        names = [f"party-{i}" for i in range(count)]
        config = load_config(self.source, self.spec.task)
        layers, placement = layers_and_placement(config, self.spec, names)
        agreement = expert_agreement(self.spec, config)
        with contextlib.ExitStack() as stack:
            hub = stack.enter_context(Hub(bind="inproc"))
            session = hub.open_session(names, agreement, deadline_s=deadline_s)
            stack.callback(session.close)
            companies = []
            for name in names:
                joint = LentChannel() if hands_off(self.spec) else ExpertChannel()
                loaded, channel = load_backbone(
                    self.source,
                    self.spec.task,
                    weights=self.spec.weights,
                    seed=3,
                    channel=joint,
                    experts=self.spec.experts,
                )
                model = tune_own(loaded, self.spec)
                if self.spec.training.gradient_checkpointing:
                    checkpoint_owner(loaded, channel)
                own = placement.experts_of(name)
                by_name = dict(zip(layers, own, strict=True))
                shard = load_experts(self.source, by_name, self.spec.task, weights=self.spec.weights)
                tune_experts(shard, by_name, self.spec, of=num_experts(config))
                host = ExpertHost(shard, layers, own, self.spec, deadline_s=deadline_s)
                host.begin(names, training=training)
                link = hub.connect(session, name)
                stack.callback(link.abandon)
                lead = handing = None
                if hands_off(self.spec):
                    lead = Lead(loaded, model, channel, host, placement, self.spec, party=name)
                    joined = lead.joined(link, names, training=training, deadline_s=deadline_s)
                    handing = stack.enter_context(joined)
                link.serve(lead or host)
                caller = ExpertCaller(link, host, placement, self.spec)
                stack.callback(caller.close)
                stack.enter_context(channel.joined(caller))
                optimizer = self.spec.optimizer.build([p for p in model.parameters() if p.requires_grad])
                companies.append(
                    Company(
                        name=name,
                        model=model.train(),
                        host=host,
                        caller=caller,
                        optimizer=optimizer,
                        lead=lead,
                        handing=handing,
                    )
                )
            yield companies


def batch_of(seed: int, rows: int = 3, tokens: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(6, 120, (rows, tokens), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, tokens - 3 :] = 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": ids_BT.masked_fill(mask_BT == 0, -100)}


def merged(companies: list[Company], house: House, owner: int = 0) -> dict[str, Tensor]:
    """Return the parameters of the model that an owner and all hosts together hold, by name."""
    config = load_config(house.source, house.spec.task)
    own = {name: p.detach() for name, p in companies[owner].model.named_parameters()}
    return own | joined_experts(config, house.spec, {c.name: c.host.trained_state() for c in companies})


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSource]:
    made: dict[str, ModelSource] = {}

    def get(family: str) -> ModelSource:
        if family not in made:
            torch.manual_seed(5)
            model = AutoModelForCausalLM.from_config(TINY[family]())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.dim() == 1 else 0.1))
            folder: Path = tmp_path_factory.mktemp("moe") / family
            model.save_pretrained(folder)
            made[family] = resolve_model(str(folder))
        return made[family]

    return get


@pytest.fixture
def make_house(checkpoints: Callable[[str], ModelSource]) -> Callable[..., House]:
    def make(family: str = "mixtral", *, experts: ExpertSettings | None = None, **more: Any) -> House:
        source = checkpoints(family)
        spec = SplitSpec(
            model=source.location,
            task=WRITE,
            tuning=None,
            optimizer=OptimizerSettings(learning_rate=0.01, weight_decay=0.01),
            training=TrainingSettings(batch_size=8, max_tokens=16, evaluation_batch_size=8),
            experts=experts or ExpertSettings(),
            seed=3,
        )
        return House(spec=replace(spec, **more), source=source)

    return make


def save_writing_moe(folder: Path, family: str = "mixtral") -> Path:
    """Write a tiny random model that writes, with the tokenizer of `tests.writers`."""
    save_writer(folder)
    torch.manual_seed(7)
    config = TINY[family]()
    config.vocab_size = len(AutoTokenizer.from_pretrained(folder))
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 2, 3
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder
