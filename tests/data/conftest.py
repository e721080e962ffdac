from pathlib import Path

import datasets
import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.data.small import make_target, make_tokenizer


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`load_dataset` copies what it reads into a cache: not into the user's."""
    cache = tmp_path_factory.mktemp("datasets_cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    return cache


@pytest.fixture(autouse=True)
def _no_authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is set, each HTTP client reads the whole file, for longer than a loopback server is asked."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def target() -> LlamaForCausalLM:
    return make_target()
