"""A party's load takes the memory of what it owns, measured by the kernel in a process of its own.

What is measured is the growth of the peak of resident memory (VmHWM, reset before the load) over what the process had
after everything was imported and a tiny model of the same family had been loaded.  Resident memory counts anonymous
pages and pages of files alike, so a checkpoint that stays mapped counts as soon as it is read; after the load every
parameter is read, for a mapped tensor that nobody has touched would cost nothing.

Files in float32 stay mapped: what is owned is resident once, as pages of the files.  Files in bfloat16 are cast: the
float32 copy is anonymous memory, and while it is made the pages of the files are resident beside it.  Those are clean
pages, which the kernel takes back when it needs them, so the bound is on anonymous memory; the peak of all may exceed
it by what the files hold of the segment and no more.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 2**20
SHARD = 60 * MIB
TOLERANCE = 0.10
CONFIG = {
    "vocab_size": 8000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "pad_token_id": 0,
}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}

MEASURE = """
import json, re, sys, threading
import torch
from vflair_flower.partition import PartitionPlan, Segment, load_segment, resolve_model
from vflair_flower.settings import TaskKind, TaskSettings

def memory(field):
    with open("/proc/self/status") as file:
        return int(re.search(field + r":\\s+(\\d+) kB", file.read())[1]) * 1024

def load(folder, which, blocks):
    plan = PartitionPlan()
    segments = {"data": plan.data_party, "model": plan.model_party, "whole": Segment.whole}
    loaded = load_segment(resolve_model(folder), segments[which](blocks), TaskSettings(kind=TaskKind.CAUSAL_LM))
    with torch.no_grad():
        total = sum(float(p.sum()) for p in loaded.model.parameters())  # every page is in
    return loaded, total

def measured(tiny, folder, which):
    load(tiny, which, 4)  # all code that a load needs has run, in this process too
    anonymous, stop = memory("RssAnon"), threading.Event()
    peaks = [anonymous]
    def watch():
        while not stop.wait(0.002):
            peaks.append(memory("RssAnon"))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM, proc(5)
    before = memory("VmRSS")
    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded, total = load(folder, which, 10)
    stop.set()
    watcher.join()
    return {
        "own": sum(p.nbytes for p in loaded.model.parameters()),
        "peak": memory("VmHWM") - before,
        "anonymous": max(peaks + [memory("RssAnon")]) - anonymous,
    }

torch.set_num_threads(1)
tiny, folder, which = sys.argv[1:]
print(json.dumps(measured(tiny, folder, which)))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's count is Linux's")


def write_checkpoint(folder: Path, config: LlamaConfig, dtype: torch.dtype) -> int:
    """Write random weights shard by shard, without ever holding the model, and return their size in bytes."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=dtype).uniform_(-0.1, 0.1)
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor
    folder.mkdir()
    config.save_pretrained(folder)
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("memory")
    small = {**CONFIG, "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}
    write_checkpoint(root / "tiny", LlamaConfig(**small), torch.bfloat16)
    for name, dtype in STORED.items():
        total = write_checkpoint(root / name, LlamaConfig(**CONFIG), dtype)
        assert total > 150 * MIB
    assert len(list((root / "float32").glob("*.safetensors"))) >= 6
    return {name: root / name for name in ("tiny", *STORED)}


@pytest.fixture(scope="module")
def measured(checkpoints: dict[str, Path]) -> dict[tuple[str, str], dict[str, int]]:
    cases = [(stored, which) for stored in STORED for which in ("data", "model", "whole")]
    rows = []
    for stored, which in cases:  # each load has a process of its own: a forked one may find torch's threads gone
        ran = subprocess.run(
            [sys.executable, "-c", MEASURE, str(checkpoints["tiny"]), str(checkpoints[stored]), which],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        rows.append(json.loads(ran.stdout.splitlines()[-1]))
    for case, row in zip(cases, rows, strict=True):
        print(*case, {name: f"{value / MIB:.1f} MiB" for name, value in row.items()})
    return dict(zip(cases, rows, strict=True))


@pytest.mark.parametrize("which", ["data", "model"])
def test_peak_is_what_the_party_owns(which: str, measured: dict[tuple[str, str], dict[str, int]]) -> None:
    party, whole = measured["float32", which], measured["float32", "whole"]
    assert party["own"] > 80 * MIB
    assert 0.9 * party["own"] < party["peak"] < (1 + TOLERANCE) * party["own"]
    assert whole["peak"] > 1.3 * party["peak"]
    assert whole["peak"] > (1 + TOLERANCE) * party["own"]


@pytest.mark.parametrize("which", ["data", "model"])
def test_peak_with_a_cast_is_what_the_party_owns(which: str, measured: dict[tuple[str, str], dict[str, int]]) -> None:
    party, whole = measured["bfloat16", which], measured["bfloat16", "whole"]
    assert 0.9 * party["own"] < party["anonymous"] < (1 + TOLERANCE) * party["own"]
    stored = party["own"] / 2
    assert party["peak"] < (1 + TOLERANCE) * (party["own"] + stored)
    assert whole["anonymous"] > (1 + TOLERANCE) * party["own"]
