"""A finished run to audit: real files of a tiny model, with rows and planted secrets, and no training."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vflair_flower.partition import Mode, PartitionPlan
from vflair_flower.partition.loading import load_segment
from vflair_flower.partition.merging import SPEC_FILE, TRAINED_FILE
from vflair_flower.partition.plan import Segment
from vflair_flower.partition.sources import resolve_model
from vflair_flower.settings import TaskSettings, TrainingSettings
from vflair_flower.spec import SplitSpec

LABELS = ("card", "money", "parcel")


@pytest.fixture(scope="session")
def finished_run(tiny_bert, tmp_path_factory):
    """Folder of a run that trained all parameters of the tiny BERT; every third row holds a secret."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    rows = tmp_path_factory.mktemp("rows")
    words = ("account", "transfer", "pin", "code", "rate", "fee", "cash", "limit", "refund", "late")
    generator = torch.Generator().manual_seed(3)
    secrets = []
    for split, count in (("train", 60), ("validation", 80), ("test", 20)):
        lines = []
        for i in range(count):
            drawn = [words[int(torch.randint(len(words), (1,), generator=generator))] for _ in range(4)]
            lines.append(
                {"id": f"{split}-{i}", "text": f"my {LABELS[i % 3]} {' '.join(drawn)}", "label": LABELS[i % 3]}
            )
            if split == "train" and i % 3 == 0:
                secrets.append({"kind": "person", "value": " ".join(drawn[:2]), "row_id": f"{split}-{i}"})
        (rows / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = TaskSettings(label_names=LABELS)
    spec = SplitSpec(
        model=tiny_bert,
        plan=PartitionPlan(mode=Mode.HBT, head_blocks=1, tail_blocks=1),
        task=task,
        tuning=None,
        training=TrainingSettings(max_tokens=16),
    )
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / SPEC_FILE).write_text(spec.to_json())
    model = load_segment(resolve_model(tiny_bert), Segment.whole(4), task).model
    torch.manual_seed(4)
    moved = {name: p.detach() + 0.01 * torch.randn_like(p) for name, p in model.named_parameters()}
    save_file(moved, folder / "adapter" / TRAINED_FILE)
    settings = {
        "data": str(rows),
        "task": "",
        "text-column": "text",
        "label-column": "label",
        "max-rows": 0,
        "seed": 0,
        "base-dir": "",
    }
    (folder / "result.json").write_text(json.dumps({"settings": settings}))
    (folder / "secrets.json").write_text(json.dumps(secrets))
    return folder
