"""Which tokens of a vocabulary a defence may change, and into which.

V tokens.  Special tokens never change, nor do rows of the table that no text is written with; what else stays as it is
is told by its text, and whoever sees the text knows it.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence

import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor

from vflair_flower.errors import ConfigurationError
from vflair_flower.privacy.defence import Scene
from vflair_flower.tasks import Encoded

_SPARE = re.compile(r"[<\[][^\w>\]]*(unused|reserved)\w*[^\w>\]]*[>\]]", re.IGNORECASE)
_BROKEN = "\ufffd"  # what a piece of a character decodes to
_FEWEST = 2


def changeable_tokens(
    scene: Scene, *, keep_punctuation: bool = False, keep_numbers: bool = False, keep_stop_words: bool = False
) -> Tensor:
    """Return which tokens may be changed, and stand in for others: bool [V], on the table's device.

    Parameters
    ----------
    scene : Scene
        Gives the tokenizer, the special tokens and V.
    keep_punctuation, keep_numbers, keep_stop_words : bool
        Leave these tokens out; stop words are scikit-learn's English ones.

    Raises
    ------
    ConfigurationError
        Less than two tokens are left.
    """
    size = len(scene.embedding_VD)
    names = scene.tokenizer.convert_ids_to_tokens(list(range(min(size, len(scene.tokenizer)))))
    named = [i for i, name in enumerate(names) if name and i not in scene.special_ids and not _SPARE.fullmatch(name)]
    kept: list[Callable[[str], bool]] = []
    if keep_punctuation:
        kept.append(is_punctuation)
    if keep_numbers:
        kept.append(is_number)
    if keep_stop_words:
        kept.append(is_stop_word)
    if kept:
        texts = scene.tokenizer.batch_decode([[i] for i in named])
        named = [i for i, text in zip(named, texts, strict=True) if not any(test(text) for test in kept)]
    if len(named) < _FEWEST:
        raise ConfigurationError(
            f"{len(named)} of {size} tokens may be changed, so no text would be. Let less of them stay "
            "(keep_punctuation, keep_numbers, keep_stop_words), or take another tokenizer."
        )
    found = torch.zeros(size, dtype=torch.bool)
    found[named] = True
    return found.to(scene.embedding_VD.device)


def rarest_tokens(encoded: Sequence[Encoded], among_V: Tensor, *, share: float) -> Tensor:
    """Return which tokens are the rarest of those that some texts use, or not in them at all: bool [V].

    Of tokens that are equally frequent, those with the higher number in the vocabulary are the rarer.

    Parameters
    ----------
    encoded : sequence of encoded rows
        The texts.
    among_V : torch.Tensor
        Bool: which tokens count; no other is ever rare.
    share : float
        Above 0 and at most 1, of the distinct tokens that the texts use.
    """
    among_V = among_V.cpu()
    counts_V = torch.zeros(len(among_V), dtype=torch.int64)
    for row in encoded:
        ids = torch.tensor(row.input_ids)
        counts_V.index_add_(0, ids, torch.ones_like(ids))
    counts_V *= among_V
    used = int((counts_V > 0).sum())
    rare_V = among_V.clone()
    rare_V[counts_V.argsort(descending=True, stable=True)[: int((1.0 - share) * used)]] = False
    return rare_V


def is_punctuation(text: str) -> bool:
    """Whether a token's text is marks and white space alone; a piece of a character is none."""
    text = _bare(text)
    return _BROKEN not in text and all(
        one.isspace() or one in string.punctuation or unicodedata.category(one)[0] == "P" for one in text
    )


def is_number(text: str) -> bool:
    """Whether a token's text has a digit and no letter."""
    return any(one.isdigit() for one in text) and not any(one.isalpha() for one in text)


def is_stop_word(text: str) -> bool:
    """Whether a token is a whole English stop word, in any case."""
    return text.strip().lower() in ENGLISH_STOP_WORDS


def _bare(text: str) -> str:
    """Return the text of a piece that goes on a word, as WordPiece marks it, without the mark."""
    return text[2:] if text.startswith("##") and len(text) > 2 else text
