"""Encode a prompt about an image, with the image, through a transformers processor.

The processor puts the image's placeholder tokens into the prompt; it must hold the placeholder where the image belongs
(`processor.image_token` in front of it is what is added where it does not).  Nothing is truncated, since a cut through
an image's tokens would part them from its features.

Invariant: labels are `IGNORED` over the image and the prompt.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks.encoded import IGNORED, EncodedImageText
from vflair_flower.tasks.examples import PromptRow
from vflair_flower.tasks.texts import end_token_id

if TYPE_CHECKING:  # seconds to import, for a type
    from transformers import ProcessorMixin


def encode_images(
    rows: Sequence[PromptRow], processor: "ProcessorMixin", *, max_tokens: int, add_response: bool = True
) -> list[EncodedImageText]:
    """Encode prompts about images and their responses.

    Parameters
    ----------
    rows : sequence of PromptRow
        Each with an image.
    processor : ProcessorMixin
        The processor of the model: a tokenizer and an image processor.
    max_tokens : int
        A row that is longer, image tokens included, is refused.
    add_response : bool
        Whether the response and the end token follow; leave them out for a model that shall write it.

    Raises
    ------
    ConfigurationError
        The tokenizer has no end token.
    DataError
        A row has no image, a broken one, or too many tokens.
    """
    tokenizer = processor.tokenizer
    end = end_token_id(tokenizer)
    token = getattr(processor, "image_token", None)
    if token is None:
        raise ConfigurationError(f"{type(processor).__name__} names no image token. Choose another model's processor.")
    encoded = []
    for row in rows:
        prompt = row.prompt if token in row.prompt else f"{token}\n{row.prompt}"
        made = dict(processor(text=[prompt], images=[opened(row)], return_tensors="pt"))
        ids = tuple(made.pop("input_ids")[0].tolist())
        made.pop("attention_mask", None)
        if ids[-1] == end:
            ids = ids[:-1]
        response: tuple[int, ...] = ()
        if add_response:
            response = (*tokenizer(row.response, add_special_tokens=False)["input_ids"], end)
        if len(ids) + len(response) > max_tokens:
            raise DataError(
                f"Row {row.id!r} has {len(ids)} tokens of image and prompt and {len(response)} of response, more than "
                f"max_tokens = {max_tokens}, and an image cannot be cut. Choose a larger max_tokens."
            )
        encoded.append(EncodedImageText(ids + response, (IGNORED,) * len(ids) + response, row.id, made))
    return encoded


def opened(row: PromptRow) -> Image.Image:
    """Return the image of a row.

    Raises
    ------
    DataError
        There is none, or it cannot be read.
    """
    if row.image is None:
        raise DataError(f"Row {row.id!r} has no image, but its task reads one. Add a column of image files.")
    try:
        source = io.BytesIO(row.image) if isinstance(row.image, bytes) else row.image
        return Image.open(source).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"Row {row.id!r}: its image cannot be read ({error}). Replace the file.") from error
