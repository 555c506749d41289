"""The README's example for a team that is already on Flower runs as it stands there."""

import re
from pathlib import Path

from flwr.app import Context, RecordDict
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from simulations.local_grid import LocalGrid
from vflair_flower.partition import resolve_model

README = Path(__file__).resolve().parents[1] / "README.md"


def code(name):
    (found,) = re.findall(rf"```python\n# {name}\n(.*?)```", README.read_text(), flags=re.DOTALL)
    namespace = {"__name__": name}
    exec(compile(found, name, "exec"), namespace)
    return namespace["app"]


def test_example_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    client_app, server_app = code("client_app.py"), code("server_app.py")
    grid = LocalGrid(client_app, [{"party": "acme"}, {"party": "birch"}])
    server_app(grid, Context(1, 1, {}, RecordDict(), {}))
    full = AutoModelForSequenceClassification.from_pretrained(resolve_model("minilm-l6").location)
    PeftModel.from_pretrained(full, tmp_path / "adapter")
