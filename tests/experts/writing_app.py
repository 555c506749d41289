"""A ClientApp of parties that write, host experts and hand over their parts.

Node configuration as in `tests.writers`, and ``mute`` (no prompts), ``keeps-experts``, ``shares-model``.
"""

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from tests.writers import _keep, _prompts, _rows, _state_dir
from vflair_flower.clients import ExpertParty, TextGeneration
from vflair_flower.control import GENERATE, HAND_OVER, HELLO

torch.set_num_threads(1)


def party(context: Context) -> ExpertParty:
    config = context.node_config
    return ExpertParty(
        _rows,
        state_dir=_state_dir,
        generation=None if "mute" in config else TextGeneration(prompts=_prompts, on_text=_keep),
        share_experts="keeps-experts" not in config,
        share_model="shares-model" in config,
    )


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    return party(context).train(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return party(context).evaluate(message, context)


@app.query(HELLO)
def hello(message: Message, context: Context) -> Message:
    return party(context).hello(message, context)


@app.query(GENERATE)
def generate(message: Message, context: Context) -> Message:
    return party(context).generate(message, context)


@app.query(HAND_OVER)
def hand_over(message: Message, context: Context) -> Message:
    return party(context).hand_over(message, context)
