"""A small real model for tests: stories260K (a Llama trained on TinyStories) as a folder that transformers loads.

The weights are those of `shared/models/stories260K`; the tokenizer is built here from its list of scored pieces, with
the `tokenizers` library, and reproduces llama2.c: a space in front, then the pair whose merged piece has the best score
is merged, again and again; what has no piece is written in bytes.
"""

import json
import shutil
import struct
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

NUM_SPECIAL = 3  # <unk>, <s>, </s>
NUM_BYTES = 256


def save_stories(shared_model: Path, folder: Path) -> Path:
    """Write configuration, weights and tokenizer of the model in `shared_model` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((shared_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    shutil.copyfile(shared_model / "model.safetensors", folder / "model.safetensors")
    stories_tokenizer(shared_model).save_pretrained(folder)
    return folder


def stories_tokenizer(shared_model: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer of llama2.c from its file of pieces and scores."""
    pieces = read_pieces(shared_model / "tok512.bin")
    vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
    byte_level = Tokenizer(
        models.BPE(vocabulary, best_merges(pieces), unk_token="<unk>", byte_fallback=True, fuse_unk=False)
    )
    byte_level.normalizer = normalizers.Prepend(" ")
    byte_level.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    byte_level.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def read_pieces(path: Path) -> list[tuple[str, float]]:
    """Read every piece and its score: an int for the longest, then for each a float, a length and its bytes."""
    content = path.read_bytes()
    pieces, at = [], 4
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        at += 8
        pieces.append((content[at : at + length].decode(), score))
        at += length
    # Names of the special pieces without the line ends that the file has around them.
    return [(piece.strip() if index < NUM_SPECIAL else piece, score) for index, (piece, score) in enumerate(pieces)]


def best_merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """List every pair of pieces that makes a piece, the one with the best score first."""
    known = {piece for piece, _ in pieces[NUM_SPECIAL + NUM_BYTES :]}
    merged = sorted(pieces[NUM_SPECIAL + NUM_BYTES :], key=lambda scored: -scored[1])
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in merged
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
