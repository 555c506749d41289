"""A tiny model that writes, and a ClientApp whose data parties write with it.

Node configuration: ``partition-id`` or ``role``; ``state-dir``; ``marker``, a word that begins every prompt; ``out``, a
folder for what the party wrote; ``break``, which makes its sink fail.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn
from transformers import AutoModelForCausalLM, BertTokenizer, LlamaConfig, LlamaForCausalLM

from tests.tiny import WORDS
from vflair_flower.certificate import TINY
from vflair_flower.clients import DataParty, ModelParty, PartyRows, TextGeneration, role_of
from vflair_flower.control import GENERATE, HELLO, MODEL_PARTY_ROLE, SERVE
from vflair_flower.tasks import PromptRow

BLOCKS = 4
PROMPTS = ("lost my card today", "where is the refund", "why", "please help me open an account now", "late fee")


def save_writer(folder: Path) -> Path:
    """Write a tiny random language model of `BLOCKS` blocks and its tokenizer."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=3,
            bos_token_id=2,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt"), eos_token="[SEP]").save_pretrained(folder)
    return folder


def save_sparse_writer(folder: Path, *, per_token: int = 4, change: Callable[[nn.Module], None] | None = None) -> Path:
    """Write a tiny random OLMoE and the tokenizer of `save_writer`.

    Each of its four layers has sixteen experts; `per_token` of them see a token.  `change` is what is done to the
    weights before they are written.
    """
    save_writer(folder)
    torch.manual_seed(4)
    config = TINY["olmoe"]()
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = len(WORDS) + 5, 0, 2, 3
    config.initializer_range, config.num_experts, config.num_experts_per_tok = 0.1, 16, per_token
    model = AutoModelForCausalLM.from_config(config)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    return folder


def prompts_of(index: int, marker: str = "") -> tuple[str, ...]:
    """Return what the party of this index asks: some of `PROMPTS`, each party another number of them."""
    return tuple(f"{marker} {text}".strip() for text in PROMPTS[index : index + 3 + index])


def _rows(context: Context) -> PartyRows:
    index = int(context.node_config["partition-id"])
    texts = [(WORDS[(index + i) % len(WORDS)], WORDS[(index + i + 1) % len(WORDS)]) for i in range(8)]
    rows = tuple(PromptRow(a, f" {b}", f"{index}-{i}") for i, (a, b) in enumerate(texts))
    return PartyRows(train=rows, validation=rows[:2])


def _prompts(context: Context) -> tuple[str, ...]:
    return prompts_of(int(context.node_config["partition-id"]), str(context.node_config.get("marker", "")))


def _keep(context: Context, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> None:
    if "break" in context.node_config:
        raise OSError("the disk is full")
    path = Path(str(context.node_config["out"])) / f"{context.node_config['partition-id']}.json"
    path.write_text(json.dumps({"prompts": list(prompts), "texts": [list(each) for each in texts]}))


def _state_dir(context: Context) -> Path:
    return Path(str(context.node_config["state-dir"]))


data_party = DataParty(
    _rows, state_dir=_state_dir, generation=TextGeneration(prompts=_prompts, on_text=_keep), threads=1
)
silent_party = DataParty(_rows, state_dir=_state_dir)
model_party = ModelParty(state_dir=_state_dir)
app = ClientApp()
app.train()(data_party.train)
app.evaluate()(data_party.evaluate)
app.train(SERVE)(model_party.serve)


@app.query(HELLO)
def hello(message: Message, context: Context) -> Message:
    party = model_party if role_of(context) == MODEL_PARTY_ROLE else data_party
    return party.hello(message, context)


@app.query(GENERATE)
def generate(message: Message, context: Context) -> Message:
    return (silent_party if "silent" in context.node_config else data_party).generate(message, context)
