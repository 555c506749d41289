"""Prompts about images through a real processor: the image's tokens, its features, and what is refused."""

import io

import pytest
import torch
from PIL import Image

from tests.tasks.words import characters
from vflair_flower.errors import ConfigurationError, DataError
from vflair_flower.tasks import IGNORED, PromptRow, collate, encode_images


@pytest.fixture(scope="module")
def processor():
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    tokenizer = characters(end=False, bos_token="[CLS]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="full"
    )


def picture(colour):
    made = io.BytesIO()
    Image.new("RGB", (20, 10), colour).save(made, format="PNG")
    return made.getvalue()


def test_image_tokens_and_prompt_are_masked_and_features_are_joined(processor, tmp_path):
    (tmp_path / "red.png").write_bytes(picture("red"))
    rows = [
        PromptRow("what?", " red", "a", image=tmp_path / "red.png"),
        PromptRow("and this one?", " blue", "b", image=picture("blue")),
    ]
    encoded = encode_images(rows, processor, max_tokens=64)
    placeholder = processor.tokenizer.convert_tokens_to_ids("<image>")
    for row, answer in zip(encoded, ("red", "blue"), strict=True):
        assert row.input_ids.count(placeholder) == 4
        asked = [label for label in row.labels if label != IGNORED]
        assert processor.tokenizer.decode(asked) == f" {answer}[SEP]"
        assert len(row.input_ids) == len(row.labels)
    batch = collate(encoded, pad_token_id=0, padding_side="left")
    assert batch.inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert not torch.equal(*batch.inputs["pixel_values"])
    assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()
    (asked_only,) = encode_images(rows[:1], processor, max_tokens=64, add_response=False)
    assert set(asked_only.labels) == {IGNORED}


def test_rows_that_cannot_be_read_are_refused(processor):
    with pytest.raises(DataError, match="Row 'a' has no image"):
        encode_images([PromptRow("p", "r", "a")], processor, max_tokens=64)
    with pytest.raises(DataError, match="Row 'a': its image cannot be read"):
        encode_images([PromptRow("p", "r", "a", image=b"no image")], processor, max_tokens=64)
    with pytest.raises(DataError, match="more than max_tokens = 6, and an image cannot be cut"):
        encode_images([PromptRow("p", "r", "a", image=picture("red"))], processor, max_tokens=6)
    nameless = type("Nameless", (), {"tokenizer": processor.tokenizer})()
    with pytest.raises(ConfigurationError, match="Nameless names no image token"):
        encode_images([PromptRow("p", "r", "a", image=picture("red"))], nameless, max_tokens=64)
