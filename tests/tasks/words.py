"""Tokenizers for these tests: one of characters made here, and the real ones of BERT and GPT-2 where they are."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;?!#$%&'()+-*/=_\"\n"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def characters(*, start: bool = True, end: bool = True, types: bool = False, **tokens: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters, with [CLS] at the start and [SEP] at the end, or without."""
    vocabulary = {piece: index for index, piece in enumerate((*SPECIAL, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    before, after = "[CLS] " if start else "", " [SEP]" if end else ""
    if start or end:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{after}",
            pair=f"{before}$A{after} $B:1{after and ' [SEP]:1'}",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = {"pad_token": "[PAD]", "eos_token": "[SEP]", "unk_token": "[UNK]"} | tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", *(["token_type_ids"] if types else []), "attention_mask"],
        **{name: token for name, token in names.items() if token},
    )


def bert(shared: Path) -> BertTokenizerFast:
    """Return the tokenizer of bert-base-uncased."""
    return BertTokenizerFast(str(shared / "models" / "tokenizers" / "bert-base-uncased" / "vocab.txt"))


def gpt2(shared: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of GPT-2."""
    folder = shared / "models" / "tokenizers" / "gpt2"
    vocabulary = json.loads((folder / "encoder.json").read_text())
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=end, unk_token=end)
