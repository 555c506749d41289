"""An auditor: a node that works on cells of an audit.

app = ClientApp()
Auditor().register(app)
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from vflair_flower.attacks import load_attacks
from vflair_flower.audit import Cell, read_subject, run_cell
from vflair_flower.control import AUDIT


class Auditor:
    """Answers an audit's messages: one cell each, with its result.

    Parameters
    ----------
    threads : int or callable
        CPU threads for torch; 0 leaves torch's own choice.
    attack_files : str or callable
        Files of attacks of your own, separated by commas.
    """

    def __init__(
        self,
        *,
        threads: int | Callable[[Context], int] = 0,
        attack_files: str | Callable[[Context], str] = "",
    ) -> None:
        self._threads = threads
        self._attack_files = attack_files

    def register(self, app: ClientApp) -> None:
        """Register with a ClientApp."""
        app.query(AUDIT)(self.audit)

    def audit(self, message: Message, context: Context) -> Message:
        """Run the cell that a message asks for; on this node's share of a GPU, if it has one."""
        threads = self._threads(context) if callable(self._threads) else self._threads
        if threads:
            torch.set_num_threads(threads)
        files = self._attack_files(context) if callable(self._attack_files) else self._attack_files
        for file in filter(None, files.split(",")):
            load_attacks(Path(file.strip()))
        asked = message.content["config"]
        result = run_cell(Cell(**json.loads(str(asked["cell"]))), read_subject(str(asked["subject"])))
        return Message(RecordDict({"result": ConfigRecord({"result": result.to_json()})}), reply_to=message)
