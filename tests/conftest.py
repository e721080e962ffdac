"""What every test shares: no network, few threads, fixed seeds, tiny models."""

import gc
import os

# Before anything imports huggingface_hub, which reads them once. A test that reaches for the network is wrong.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_DISABLED="true",
    MPLBACKEND="Agg",
)
# Tests are written for the CPU; name a device to run them elsewhere.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    # Tiny matrices gain nothing from threads, and workers of pytest-xdist would fight over the cores.
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_not_garbage() -> None:
    # `Trainer.train()` collects garbage: a third of a second each time, if all that was imported is looked through.
    # Files before this one may have imported more.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    set_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, shared by the whole session: do not change it, call `tiny_tokenizer()` for your own."""
    return tiny.tiny_tokenizer()


@pytest.fixture
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """(draft, target): two Llamas that agree in part. New for every test, so it may be trained."""
    return tiny.tiny_pair("llama")


@pytest.fixture(params=sorted(tiny.ARCHITECTURES))
def any_pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(draft, target) of every architecture in turn."""
    return tiny.tiny_pair(request.param)


@pytest.fixture
def saved_pair(
    tmp_path: Path, pair: tuple[PreTrainedModel, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> tuple[Path, Path]:
    """Directories of a saved draft and target, tokenizer beside each, as a user has them."""
    paths = tmp_path / "draft", tmp_path / "target"
    for model, path in zip(pair, paths, strict=True):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths
