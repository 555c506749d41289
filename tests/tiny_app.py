"""A ClientApp on tiny rows, for nodes in this process or in processes of their own.

Node configuration: ``partition-id`` or ``role``; ``state-dir``; ``marker`` (a word put into every text).
The query ``inspect`` tells what the node's process has in memory.
"""

import gc
import hashlib
import os
import re
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from tests.tiny import tiny_rows
from vflair_flower.clients import DataParty, ModelParty, PartyRows, role_of
from vflair_flower.control import HELLO, MODEL_PARTY_ROLE, SERVE

torch.set_num_threads(1)


def rows(context: Context) -> PartyRows:
    index = int(context.node_config["partition-id"])
    sizes = {"num_train": int(context.node_config["num-train"])} if "num-train" in context.node_config else {}
    return tiny_rows(index, marker=str(context.node_config.get("marker", "")), **sizes)


def state_dir(context: Context) -> Path:
    return Path(str(context.node_config["state-dir"]))


data_party = DataParty(rows, state_dir=state_dir)
model_party = ModelParty(state_dir=state_dir)
app = ClientApp()
app.train(SERVE)(model_party.serve)
app.evaluate()(data_party.evaluate)
_kept: list[object] = []
"""Sessions and servers, kept so that a look into memory finds what they held."""


def _keep_what_a_session_holds() -> None:
    from vflair_flower.clients import data_party as module
    from vflair_flower.remote import SegmentServer

    train_round, begin = module.train_round, SegmentServer.begin

    def keep_session(session: object, *args: object) -> object:
        _kept[:] = [session, *args]
        return train_round(session, *args)

    def keep_server(server: object, *args: object, **kwargs: object) -> object:
        _kept[:] = [server]
        return begin(server, *args, **kwargs)

    module.train_round, SegmentServer.begin = keep_session, keep_server


_keep_what_a_session_holds()


@app.query(HELLO)
def hello(message: Message, context: Context) -> Message:
    party = model_party if role_of(context) == MODEL_PARTY_ROLE else data_party
    return party.hello(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    if context.node_config.get("die-in-round") == message.content["config"]["server-round"]:
        return data_party.train(_dying(message), context)
    return data_party.train(message, context)


def _dying(message: Message) -> Message:
    """Kill this process with SIGKILL at its third backward pass: in the middle of a step."""
    calls = 0
    from vflair_flower.remote import segment

    original = segment.RemoteSegment._backward

    def backward(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), 9)
        return original(*args)

    segment.RemoteSegment._backward = backward
    return message


@app.query("inspect")
def inspect(message: Message, context: Context) -> Message:
    """Return which of the given tensors (by digest) and texts are anywhere in this process."""
    config = message.content["config"]
    wanted = set(str(config["digests"]).split())
    found = {d for d in map(digest, _tensors()) if d in wanted}
    texts = [text for text in str(config["texts"]).split() if _in_memory(text)]
    reply = ConfigRecord({"digests": " ".join(sorted(found)), "texts": " ".join(texts)})
    return Message(RecordDict({"config": reply}), reply_to=message)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().cpu().numpy().tobytes()).hexdigest()


def _tensors() -> list[torch.Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.is_floating_point() and o.numel() > 1]


def _in_memory(reversed_text: str) -> bool:
    """Search all writable memory of this process for a text, without ever holding the text itself.

    The text comes reversed, and the pattern has brackets around every letter, so the question is not the answer.
    """
    pattern = re.compile(b"".join(b"[%c]" % letter for letter in reversed(reversed_text.encode())))
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if match is None:
                continue
            start, end = (int(x, 16) for x in match.groups())
            try:
                memory.seek(start)
                if pattern.search(memory.read(end - start)):
                    return True
            except (OSError, OverflowError, ValueError):
                continue
    return False
