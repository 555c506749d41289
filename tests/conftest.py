"""Fixtures for all tests: tiny models on disk, and what lies beside the project where it does."""

from pathlib import Path

import pytest

from tests.tiny import save_tiny

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """Folder of a tiny BERT classifier with tokenizer."""
    return str(save_tiny(tmp_path_factory.mktemp("tiny-bert"), "bert"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a tiny Llama classifier with tokenizer."""
    return str(save_tiny(tmp_path_factory.mktemp("tiny-llama"), "llama"))


@pytest.fixture(scope="session")
def shared():
    """Folder of real data and models; the test is skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"real data and models are not here: {SHARED} does not exist")
    return SHARED
