"""The loopback Hub, and drafts ready to be published to it."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_draftkd.hub.provenance import Provenance, TrainingSummary
from hf_draftkd.models.identity import weights_checksum
from tests import tiny
from tests.hub import samples
from tests.hub.fake_hub import FakeHub, User

WRITER = "hf_" + "w" * 34
READER = "hf_" + "r" * 34


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """A Hub that knows `me` (may write) and `guest` (may not); `me` is logged in. Retries do not wait."""
    cache = tmp_path_factory.mktemp("cache")
    with FakeHub() as server:
        server.tokens |= {WRITER: User("me"), READER: User("guest", can_write=False)}
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        # Where it is set, each client reads the whole file, for longer than this server is asked.
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        yield server
        _http.close_session()


@pytest.fixture
def draft_folder(_finished_draft: Path, tmp_path: Path) -> Path:
    """A draft as `draftkd train` and `draftkd evaluate` leave it, with much beside it that nobody should get."""
    return Path(shutil.copytree(_finished_draft, tmp_path / "output" / "draft"))


@pytest.fixture(scope="session")
def _finished_draft(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Made once; the weights are those of the `pair` fixture."""
    pair = tiny.tiny_pair("llama")
    folder = tmp_path_factory.mktemp("finished") / "draft"
    pair[0].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_report(folder, pair)
    training = TrainingSummary(
        target=samples.TARGET, target_revision=samples.REVISION, signal="white_box", divergence="forward_kl"
    )
    Provenance(
        command=f"draftkd train --hub_token {WRITER}",
        training=training,
        weights_sha256=weights_checksum(folder),
    ).save(folder)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    (folder / "notes.txt").write_text("my private notes")
    (folder / "modeling_evil.py").write_text("print('code')")
    checkpoint = folder / "checkpoint-10"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"old")
    (folder / "block_efficiency.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 20)
    (folder / "not_a_plot.png").write_bytes(b"<svg><script>alert(1)</script></svg>")
    return folder


def write_report(folder: Path, pair: tuple[PreTrainedModel, PreTrainedModel], **changes: object) -> dict:
    """A report that fits the draft, in its folder."""
    draft, target = pair
    sizes = {"draft": draft.num_parameters(), "target": target.num_parameters()}
    report = samples.report(
        target={"name": samples.TARGET, "revision": samples.REVISION, "num_parameters": sizes["target"]},
        # A name that is not a folder here: the draft was copied after it was measured.
        draft={"name": "org/draft", "num_parameters": sizes["draft"]},
    )
    report |= changes
    (folder / "report.json").write_text(json.dumps(report))
    return report


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what it holds: for "nothing on disk has changed"."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def replaced(folder: Path, **changes: object) -> None:
    """Change fields of the stored provenance."""
    stored = Provenance.load(folder)
    assert stored is not None
    dataclasses.replace(stored, **changes).save(folder)  # type: ignore[arg-type]
