"""What is not published: bad input, and reports of another draft, target or revision."""

import dataclasses
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hf_draftkd.hub.provenance import Provenance
from hf_draftkd.models.identity import loaded_checksum, stored_parameters
from hf_draftkd.models.loading import load_draft
from tests.hub import samples
from tests.hub.conftest import replaced, write_report
from tests.hub.fake_hub import FakeHub
from tests.hub.pushing import ID, push
from tests.multimodal import tiny_multimodal

# huggingface_hub 2.4 sends LFS parts as `data=`, which its own HTTP client deprecates; users upload through Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


class TestBadInput:
    def test_names(self, hub: FakeHub, draft_folder: Path):
        for name in ("a/b/c", "me/dr aft", "", "me/-draft-", "me/x.git"):
            with pytest.raises(ValueError, match=r"[Rr]epo[_ ]id"):
                push(draft_folder, repo_id=name)
        with pytest.raises(ValueError, match="`commit_message` is empty"):  # an empty repository was made
            push(draft_folder, commit_message=" ")
        assert hub.requests == []

    def test_a_repository_that_holds_something_else(self, hub: FakeHub, draft_folder: Path):
        """Catches a slip of the keyboard that overwrites the target with its draft."""
        hub.add("me/target", {"model.safetensors": b"precious", "README.md": "# big\n"})
        with pytest.raises(ValueError, match="not a draft"):
            push(draft_folder, repo_id="me/target")
        assert hub.repos["me/target"].files()["model.safetensors"] == b"precious"

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: (folder / "config.json").unlink(), "no config.json"),
            (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
            (lambda folder: [p.unlink() for p in folder.glob("tokenizer*")], "no tokenizer"),
            (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "damaged"),
            (lambda folder: (folder / "report.json").write_text("{"), "not JSON"),
            (lambda folder: (folder / "report.json").write_text('{"schema_version": 99}'), "schema_version 99"),
            (lambda folder: (folder / "provenance.json").write_text('{"x": 1}'), "unknown key `x`"),
        ],
    )
    def test_a_folder_without_a_whole_draft(self, hub: FakeHub, draft_folder: Path, spoil, message):
        spoil(draft_folder)
        with pytest.raises(ValueError, match=message):
            push(draft_folder)
        assert hub.requests == [], "all of this is seen before the Hub is asked"

    def test_no_folder(self, hub: FakeHub):
        with pytest.raises(ValueError, match="There is no folder 'nowhere'"):
            push(Path("nowhere"))

    def test_a_multimodal_model(self, hub: FakeHub, tmp_path: Path):
        """Catches what `assistant_model` could not take, uploaded as a draft."""
        tiny_multimodal("Gemma3").save_pretrained(tmp_path / "images")
        with pytest.raises(ValueError, match=r"holds a multimodal model.*--text_of"):
            push(tmp_path / "images")
        assert hub.requests == []

    def test_pickled_weights_only(self, hub: FakeHub, draft_folder: Path):
        (draft_folder / "model.safetensors").rename(draft_folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="pickle"):
            push(draft_folder)

    def test_an_adapter_that_is_not_merged(self, hub: FakeHub, tmp_path: Path, draft_folder: Path, pair):
        """Catches both forms: the adapter alone, and adapter weights inside a whole model."""
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(pair[0], LoraConfig(target_modules=["q_proj"], r=2))
        wrapped.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="not merged"):
            push(tmp_path / "adapter")
        tensors = {key: value.contiguous() for key, value in wrapped.base_model.model.state_dict().items()}
        save_file(tensors, draft_folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="not merged"):
            push(draft_folder)

    def test_quantised_weights(self, draft_folder: Path):
        import torch

        tensors = load_file(draft_folder / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
        save_file(tensors, draft_folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="quantised"):
            stored_parameters(draft_folder)

    def test_an_index_that_leads_out_of_the_folder(self, draft_folder: Path):
        """Catches `../../.ssh/id_rsa` in a weight map."""
        (draft_folder / "model.safetensors").rename(draft_folder.parent / "secret.safetensors")
        (draft_folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
        with pytest.raises(ValueError, match="not a weight file"):
            push(draft_folder)


class TestMismatch:
    """A report about something else is refused; if it must be published, the card says so."""

    def refused_then_allowed(self, folder: Path, hub: FakeHub, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            push(folder)
        assert hub.requests == []
        push(folder, allow_mismatch=True)
        card = hub.repos[ID].files()["README.md"].decode()
        assert "Published although" in card

    def test_another_draft(self, hub: FakeHub, draft_folder: Path, pair):
        write_report(draft_folder, pair, draft={"name": "org/other", "num_parameters": 999_999})
        self.refused_then_allowed(draft_folder, hub, "999,999 parameters")

    def test_another_target(self, hub: FakeHub, draft_folder: Path, pair):
        size = pair[1].num_parameters()
        other = {"name": "org/other", "revision": samples.REVISION, "num_parameters": size}
        write_report(draft_folder, pair, target=other)
        self.refused_then_allowed(draft_folder, hub, "target 'org/target-7b', the report is about 'org/other'")

    def test_another_revision_of_the_target(self, hub: FakeHub, draft_folder: Path, pair):
        size = pair[1].num_parameters()
        other = {"name": samples.TARGET, "revision": "a" * 40, "num_parameters": size}
        write_report(draft_folder, pair, target=other)
        self.refused_then_allowed(draft_folder, hub, "target revision")

    def test_weights_that_changed_since(self, hub: FakeHub, draft_folder: Path):
        tensors = load_file(draft_folder / "model.safetensors")
        tensors["model.norm.weight"] += 1
        save_file(tensors, draft_folder / "model.safetensors", {"format": "pt"})
        self.refused_then_allowed(draft_folder, hub, "not those from when provenance.json was written")

    def test_a_report_that_measured_other_weights(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a draft of the same name and size whose numbers are another's: only the checksum can tell."""
        draft, target = pair
        about = {"name": "org/draft", "num_parameters": draft.num_parameters(), "dtype": "float32"}
        write_report(draft_folder, pair, draft=about | {"weights_sha256": loaded_checksum(draft)})
        push(draft_folder, repo_id="me/same")
        hub.requests.clear()
        write_report(draft_folder, pair, draft=about | {"weights_sha256": loaded_checksum(target)})
        self.refused_then_allowed(draft_folder, hub, "not those from when the report's draft was measured")

    def test_weights_measured_in_another_number_format_are_the_same_draft(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a refusal of every draft that is trained in float32 and measured in bfloat16."""
        measured = load_draft(draft_folder, dtype="bfloat16")
        about = {"name": "elsewhere/draft", "num_parameters": 1, "dtype": "bfloat16"}
        write_report(draft_folder, pair, draft=about | {"weights_sha256": loaded_checksum(measured)})
        push(draft_folder)
        assert "Published although" not in hub.repos[ID].files()["README.md"].decode()

    def test_a_neighbours_report_is_passed_over(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a report beside the folder that is about another draft: nobody named it, so nobody needs telling."""
        (draft_folder / "report.json").unlink()
        draft, target = pair
        about = {"name": "org/other", "num_parameters": draft.num_parameters(), "dtype": "float32"}
        write_report(draft_folder.parent, pair, draft=about | {"weights_sha256": loaded_checksum(target)})
        upload = push(draft_folder)
        assert "beside the folder is left out" in str(upload)
        assert "report.json" not in hub.repos[ID].files()
        with pytest.raises(ValueError, match="was measured"):
            push(draft_folder, report=draft_folder.parent / "report.json")
        write_report(draft_folder.parent, pair, draft=about | {"weights_sha256": loaded_checksum(draft)})
        assert "report.json" in {file.path for file in push(draft_folder, dry_run=True).files}

    def test_pictures_beside_the_folder_stay_at_home(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a holiday in public: the folder above a draft, or of a report, may be anybody's home."""
        (draft_folder / "report.json").unlink()
        above = draft_folder.parent
        write_report(above, pair)
        (above / "plots").mkdir()
        for name in ("holiday.png", "plots/speed.png"):
            (above / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(9))
        plots = {"plots/block_efficiency.png", "plots/speed.png"}
        for report in (None, above / "report.json"):
            upload = push(draft_folder, report=report, dry_run=True)
            assert {file.path for file in upload.files if file.path.endswith(".png")} == plots

    def test_one_folder_has_many_paths(self, hub: FakeHub, draft_folder: Path, pair, monkeypatch):
        """Catches `./target` in training and its absolute path in evaluation taken for two targets."""
        folder = draft_folder.parent / "target"
        folder.mkdir()
        monkeypatch.chdir(folder.parent)
        stored = Provenance.load(draft_folder)
        replaced(draft_folder, training=dataclasses.replace(stored.training, target="target", target_revision=None))
        write_report(draft_folder, pair, target={"name": str(folder), "num_parameters": pair[1].num_parameters()})
        assert push(draft_folder).commit

    def test_what_does_not_fit_is_said_without_paths_of_this_machine(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a home directory in the very sentence that admits a mismatch, or in a warning of the report."""
        private = draft_folder.parent / "secret-place"
        about = {"name": str(private / "target"), "num_parameters": pair[1].num_parameters()}
        warning = f"The texts were written by {private}/other, the target here is org/x."
        ranked = [{"draft": {"name": str(private / "one"), "num_parameters": 1}, "settings": []}]
        write_report(draft_folder, pair, target=about, warnings=[warning], drafts=ranked)
        replaced(draft_folder, command=f"draftkd train --output_dir {private}/draft")
        push(draft_folder, allow_mismatch=True)
        files = hub.repos[ID].files()
        assert [path for path, body in files.items() if b"secret-place" in body] == []
        assert "Published although" in files["README.md"].decode()
        assert "written by path/to/other, the target" in files["report.json"].decode()
        assert "--output_dir path/to/draft" in files["provenance.json"].decode()
