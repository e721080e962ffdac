"""The card of a repository that is pushed to again: numbers are renewed, words are kept."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.hub import samples
from tests.hub.conftest import replaced, write_report
from tests.hub.fake_hub import FakeHub
from tests.hub.pushing import ID, push

# huggingface_hub 2.4 sends LFS parts as `data=`, which its own HTTP client deprecates; users upload through Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


class TestCardOnTheHub:
    def test_prose_written_on_the_hub_survives_and_figures_change(self, hub: FakeHub, draft_folder: Path, pair):
        push(draft_folder)
        card = hub.repos[ID].files()["README.md"].decode()
        edited = card.replace("It is not meant to be used by itself.", "Made with love.").replace(
            "license: mit", "license: apache-2.0\nthumbnail: mine.png"
        )
        hub.repos[ID].commit(hub.repos[ID].files() | {"README.md": edited.encode()}, "edit on the Hub")
        better = samples.report()["settings"]
        better[0]["acceptance_rate"] = samples.estimate(0.8125, 0.01)
        write_report(draft_folder, pair, settings=better)
        upload = push(draft_folder, license=None)
        text = hub.repos[ID].files()["README.md"].decode()
        assert "Made with love." in text
        assert "thumbnail: mine.png" in text
        assert "license: apache-2.0" in text
        assert "0.812" in text
        assert "0.710" not in text
        assert "the words of the card on the Hub" in str(upload)

    def test_prose_in_the_folder_is_published(self, hub: FakeHub, draft_folder: Path):
        push(draft_folder)
        text = hub.repos[ID].files()["README.md"].decode()
        (draft_folder / "README.md").write_text(text.replace("by itself.", "by itself, says the author."))
        push(draft_folder)
        assert "says the author." in hub.repos[ID].files()["README.md"].decode()

    def test_words_on_both_sides_are_never_chosen_silently(self, hub: FakeHub, draft_folder: Path):
        push(draft_folder)
        text = hub.repos[ID].files()["README.md"].decode()
        (draft_folder / "README.md").write_text(text.replace("by itself.", "by itself. LOCAL"))
        hub.repos[ID].commit(
            hub.repos[ID].files() | {"README.md": text.replace("by itself.", "by itself. REMOTE").encode()}, "edit"
        )
        with pytest.raises(ValueError, match="prose='hub'"):
            push(draft_folder)
        push(draft_folder, prose="hub")
        assert "REMOTE" in hub.repos[ID].files()["README.md"].decode()
        push(draft_folder, prose="local")
        assert "LOCAL" in hub.repos[ID].files()["README.md"].decode()

    def test_a_title_chosen_on_the_hub_is_kept(self, hub: FakeHub, draft_folder: Path):
        push(draft_folder)
        text = hub.repos[ID].files()["README.md"].decode().replace(f"# {ID}\n", "# A fast one\n")
        hub.repos[ID].commit(hub.repos[ID].files() | {"README.md": text.encode()}, "rename")
        push(draft_folder, tags=["new"])
        assert "# A fast one" in hub.repos[ID].files()["README.md"].decode()

    def test_a_broken_card_is_not_replaced(self, hub: FakeHub, draft_folder: Path):
        """Catches words that are lost because the metadata above them does not parse."""
        card = b"---\ntags: [draft-model\n---\n# mine\n"
        hub.add(ID, {"README.md": card})
        with pytest.raises(ValueError, match=r"metadata of the card of me/draft cannot be read"):
            push(draft_folder)
        assert hub.repos[ID].files()["README.md"] == card

    def test_a_card_in_another_encoding_is_named(self, hub: FakeHub, draft_folder: Path):
        """Catches "can't decode byte 0xe9", which names no file."""
        card = "---\nlicense: mit\n---\n# Mes mots à moi\n".encode("latin-1")
        hub.add(ID, {"README.md": card})
        with pytest.raises(ValueError, match=r"The card of me/draft is not UTF-8 .*save it as such"):
            push(draft_folder)
        (draft_folder / "README.md").write_bytes(card)
        with pytest.raises(ValueError, match=r"draft/README\.md is not UTF-8"):
            push(draft_folder, repo_id="me/other")

    def test_an_edit_in_between_is_not_lost(self, hub: FakeHub, draft_folder: Path, monkeypatch):
        """Catches a push that overwrites what somebody wrote after the card was read."""
        push(draft_folder)
        original = HfApi.create_repo

        def meanwhile(self, *args, **kwargs):
            hub.repos[ID].commit(hub.repos[ID].files() | {"README.md": b"# edited meanwhile\n"}, "edit")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(HfApi, "create_repo", meanwhile)
        with pytest.raises(ValueError, match="at the same time"):
            push(draft_folder, tags=["new"])
        assert hub.repos[ID].files()["README.md"] == b"# edited meanwhile\n"

    def test_what_was_a_folder_is_no_repository_elsewhere(
        self, hub: FakeHub, draft_folder: Path, pair, tmp_path: Path, monkeypatch
    ):
        """Catches a card that, pushed from another folder, links to a stranger and takes over their licence."""
        for name in ("models/draft0", "models/target", "data/prompts", "data/rows"):
            hub.add(name, {"README.md": "---\nlicense: stolen\n---\n", "config.json": "{}"})
        training = samples.training(
            draft="models/draft0",
            target="models/target",
            dataset="data/rows",
            draft_is_local=True,
            target_is_local=True,
            dataset_is_local=True,
            draft_revision=None,
            target_revision=None,
        )
        replaced(draft_folder, training=training)
        parts = {"revision": None, "is_local": True, "num_parameters": pair[1].num_parameters()}
        target = {key: value for key, value in parts.items() if value is not None} | {"name": "models/target"}
        prompts = {"source": "data/prompts", "is_local": True, "count": 3, "sha256": "0"}
        report = write_report(draft_folder, pair, target=target, prompts=prompts)
        report["draft"] |= {"name": "models/new", "is_local": True}
        (draft_folder / "report.json").write_text(json.dumps(report))
        monkeypatch.chdir(tmp_path)
        hub.requests.clear()
        with pytest.raises(ValueError, match="does not start from a model on the Hub"):
            push(draft_folder, license=None)
        assert not [path for _, path in hub.requests if "models/target" in path], "a stranger's config was read"
        upload = push(draft_folder)
        for file in upload.files:
            if file.path in ("README.md", "provenance.json", "report.json"):
                text = file.read().decode()
                assert not re.search(r"(?<!path/to/)(models|data)/(draft0|target|prompts|rows|new)", text), file.path
        assert "path/to/draft0" in upload.card.text
        assert upload.card.data.get("base_model") is None
        with pytest.raises(ValueError, match="need prompts from a benchmark on the Hub"):
            push(draft_folder, benchmark_task="function_calling")

    def test_what_was_a_repository_is_none_of_the_folders_here(
        self, hub: FakeHub, draft_folder: Path, tmp_path, monkeypatch
    ):
        """Catches a base model that gets lost where a folder of its name happens to lie."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "stock-draft").mkdir(parents=True)
        replaced(draft_folder, training=samples.training())
        assert push(draft_folder, dry_run=True).card.data.base_model == samples.TARGET, "an old record: looked up here"
        replaced(draft_folder, training=samples.training(draft_is_local=False))
        assert push(draft_folder, dry_run=True).card.data.base_model == "org/stock-draft"

    def test_licence_is_inherited_or_asked_for(self, hub: FakeHub, draft_folder: Path):
        with pytest.raises(ValueError, match=r"Which licence.*Pass `license` .`--license`"):
            push(draft_folder, license=None)
        hub.add(samples.TARGET, {"README.md": "---\nlicense: gemma\n---\n"})
        push(draft_folder, license=None)
        assert "license: gemma" in hub.repos[ID].files()["README.md"].decode()

    def test_a_licence_of_its_own_is_inherited_with_its_name(self, hub: FakeHub, draft_folder: Path):
        """Catches `license: other` alone, which tells nobody what they may do."""
        named = "license: other\nlicense_name: research\nlicense_link: https://huggingface.co/org/x/blob/main/LICENSE\n"
        hub.add(samples.TARGET, {"README.md": f"---\n{named}---\n"})
        data = push(draft_folder, license=None, dry_run=True).card.data.to_dict()
        assert named == "".join(f"{key}: {data[key]}\n" for key in ("license", "license_name", "license_link"))

    def test_metadata_that_the_client_cannot_take_is_no_crash(self, hub: FakeHub, draft_folder: Path):
        """Catches a TypeError of huggingface_hub about tags that are a number, in the base's card or one's own."""
        odd = {"cardData": {"license": "mit", "tags": 3}}
        hub.overrides |= {samples.TARGET: odd, ID: odd}
        hub.add(samples.TARGET, {"README.md": "x"})
        hub.add(ID, {"README.md": "my words"})
        with pytest.raises(ValueError, match=f"Which licence. The metadata of {samples.TARGET} cannot be read"):
            push(draft_folder, license=None)
        assert "my words" in push(draft_folder).card.text

    def test_metadata_the_hub_refuses_is_said_before_anything_is_uploaded(self, hub: FakeHub, draft_folder: Path):
        hub.fail("POST", "/api/validate-yaml", status=400)
        with pytest.raises(ValueError, match=r"(?s).*"):
            push(draft_folder)
        assert not hub.objects
