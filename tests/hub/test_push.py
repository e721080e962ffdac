"""Publishing against a Hub that answers, and against one that fails."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, parse_eval_result_entries
from transformers import GenerationConfig

from hf_draftkd.cli import push as push_command
from hf_draftkd.cli.errors import UsageError
from hf_draftkd.cli.main import dispatch
from hf_draftkd.evaluation.recommendation import PARALLEL
from hf_draftkd.evaluation.report import Recommendation
from hf_draftkd.hub.model_card import DraftModelCard
from hf_draftkd.hub.upload_files import generation_config_file
from hf_draftkd.models.draft_length import recorded_parallel_length
from hf_draftkd.models.identity import weights_checksum
from tests.hub.conftest import READER, WRITER, replaced, snapshot, write_report
from tests.hub.fake_hub import FakeHub
from tests.hub.pushing import ID, PUBLISHED, push

# huggingface_hub 2.4 sends LFS parts as `data=`, which its own HTTP client deprecates; users upload through Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


class TestOneCommit:
    def test_only_the_list_is_published(self, hub: FakeHub, draft_folder: Path):
        """Catches pickles, notes, code, checkpoints and false images in a public repository."""
        upload = push(draft_folder)
        files = hub.repos[ID].files()
        assert set(files) - {".gitattributes"} == PUBLISHED
        assert len(hub.repos[ID].messages) == 2, "one commit beside the Hub's own first one"
        assert upload.commit == hub.repos[ID].refs["main"]
        for path, body in files.items():
            # How pickles of protocol 2 and above, and torch's zipped ones, begin.
            assert not body.startswith((b"\x80", b"PK")), path
            assert not path.endswith((".bin", ".pt", ".pkl", ".py"))

    def test_weights_arrive_as_they_are(self, hub: FakeHub, draft_folder: Path):
        push(draft_folder)
        assert hub.repos[ID].files()["model.safetensors"] == (draft_folder / "model.safetensors").read_bytes()

    def test_the_tuned_length_is_in_the_generation_config(self, hub: FakeHub, draft_folder: Path):
        """Catches a draft that is published without what makes it fast; the folder itself stays as it is."""
        before = snapshot(draft_folder)
        push(draft_folder)
        held = json.loads(hub.repos[ID].files()["generation_config.json"])
        assert held["num_assistant_tokens"] == 5
        assert held["num_assistant_tokens_schedule"] == "constant"
        assert held["assistant_confidence_threshold"] == 0.0
        assert snapshot(draft_folder) == before

    def test_a_length_of_one_pass_leaves_that_of_assistant_model_alone(self, draft_folder: Path):
        advice = Recommendation(
            worth_it=True, num_assistant_tokens=7, way=PARALLEL, predicted_speedup=1.5, reason="It pays."
        )
        path = draft_folder / "generation_config.json"
        held = json.loads(generation_config_file(draft_folder, advice).source)
        kept = {name: value for name, value in json.loads(path.read_text()).items() if not name.startswith("_")}
        assert held == kept | {"parallel_num_assistant_tokens": 7}
        assert recorded_parallel_length(GenerationConfig.from_dict(held)) == 7
        path.write_text(json.dumps(held | {"parallel_num_assistant_tokens": 3}))
        assert generation_config_file(draft_folder, advice).source == path

    def test_a_length_is_published_beside_the_special_ids_of_the_config(self, hub: FakeHub, draft_folder: Path):
        """Catches a draft saved without a generation config that, once published, has no end-of-sequence token."""
        path = draft_folder / "generation_config.json"
        saved = GenerationConfig.from_pretrained(draft_folder)
        path.unlink()
        push(draft_folder)
        path.write_bytes(hub.repos[ID].files()[path.name])
        published = GenerationConfig.from_pretrained(draft_folder)
        assert published.num_assistant_tokens == 5
        assert published.eos_token_id == saved.eos_token_id is not None

    def test_a_length_set_by_hand_wins(self, hub: FakeHub, draft_folder: Path):
        path = draft_folder / "generation_config.json"
        own = {
            "num_assistant_tokens": 2,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | own))
        push(draft_folder)
        assert json.loads(hub.repos[ID].files()["generation_config.json"])["num_assistant_tokens"] == 2

    def test_the_same_command_again_changes_nothing(self, hub: FakeHub, draft_folder: Path):
        """Catches a card that is different every time, and so a commit for nothing."""
        first = push(draft_folder)
        assert push(draft_folder).commit == first.commit
        assert len(hub.repos[ID].messages) == 2

    def test_stale_weights_go_in_the_same_commit(self, hub: FakeHub, draft_folder: Path):
        """Catches old shards, or an old single file that transformers would prefer, beside the new weights."""
        hub.add(
            ID,
            {
                "README.md": "---\ntags: [draft-model]\n---\n",
                "model-00001-of-00002.safetensors": b"old",
                "model.safetensors.index.json": "{}",
                "plots/old.png": b"old",
                "CITATION.cff": "kept",
            },
        )
        upload = push(draft_folder)
        assert set(upload.deleted) == {
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "plots/old.png",
        }
        assert set(hub.repos[ID].files()) == PUBLISHED | {"CITATION.cff"}

    def test_an_adapter_that_was_there_before_goes(self, hub: FakeHub, draft_folder: Path):
        """Catches a merged draft that nobody loads: transformers takes the adapter's base, and puts the adapter on."""
        adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"old", "notes.md": b"mine"}
        hub.add(ID, adapter | {"README.md": b"---\ntags: [draft-model]\n---\n"})
        assert set(push(draft_folder).deleted) == {"adapter_config.json", "adapter_model.safetensors"}
        assert set(hub.repos[ID].files()) == PUBLISHED | {"notes.md"}

    def test_sharded_weights(self, hub: FakeHub, draft_folder: Path, pair):
        before = weights_checksum(draft_folder)
        (draft_folder / "model.safetensors").unlink()
        pair[0].save_pretrained(draft_folder, max_shard_size="20KB")
        assert len(list(draft_folder.glob("model-*.safetensors"))) > 1
        assert weights_checksum(draft_folder) == before, "the checksum must not depend on sharding"
        push(draft_folder)
        assert "model.safetensors.index.json" in hub.repos[ID].files()

    def test_private_branch_and_pull_request(self, hub: FakeHub, draft_folder: Path):
        push(draft_folder, private=True)
        assert hub.repos[ID].private
        push(draft_folder, revision="v2", tags=["second"])
        assert "second" in DraftModelCard(hub.repos[ID].files("v2")["README.md"].decode()).data.tags
        assert "second" not in DraftModelCard(hub.repos[ID].files("main")["README.md"].decode()).data.tags
        upload = push(draft_folder, create_pr=True, tags=["third"])
        assert upload.url.endswith("/discussions/1")
        assert "third" in hub.repos[ID].files("refs/pr/1")["README.md"].decode()
        push(draft_folder, revision="refs/pr/1", tags=["third", "fourth"])
        assert "fourth" in hub.repos[ID].files("refs/pr/1")["README.md"].decode(), "a pull request is no branch to make"
        with pytest.raises(ValueError, match="pull request"):
            push(draft_folder, create_pr=True, revision="v2")

    @pytest.mark.parametrize("create_pr", [False, True])
    def test_a_wish_for_privacy_never_ends_in_public(self, hub: FakeHub, draft_folder: Path, create_pr: bool):
        """Catches `--private` that uploads to a public repository and prints "private"."""
        push(draft_folder)
        before = hub.repos[ID].files()
        for dry_run in (True, False):
            with pytest.raises(ValueError, match=r"me/draft exists and is public.*Make it private in its settings"):
                push(draft_folder, private=True, tags=["new"], create_pr=create_pr, dry_run=dry_run)
        assert hub.repos[ID].files() == before
        assert set(hub.repos[ID].refs) == {"main"}

    def test_nor_where_the_repository_appears_meanwhile(self, hub: FakeHub, draft_folder: Path, monkeypatch):
        """Catches a check that is made once, long before the upload."""
        original = HfApi.create_repo

        def meanwhile(self, repo_id, **options):
            hub.add(repo_id, {})
            return original(self, repo_id, **options)

        monkeypatch.setattr(HfApi, "create_repo", meanwhile)
        with pytest.raises(ValueError, match="exists and is public"):
            push(draft_folder, private=True)
        assert hub.repos[ID].files() == {}
        assert not hub.objects

    def test_the_visibility_that_is_shown_is_the_real_one(self, hub: FakeHub, draft_folder: Path):
        """Catches "public" for a repository that is private already, and "private" as a mere echo of the option."""
        assert "me/draft, new, public or private as its owner's default says:" in str(push(draft_folder, dry_run=True))
        assert str(push(draft_folder)).startswith("commit to me/draft, public:")
        push(draft_folder, repo_id="me/own", private=True)
        for private in (None, False, True):
            for dry_run in (True, False):
                upload = push(draft_folder, repo_id="me/own", private=private, dry_run=dry_run)
                assert str(upload).startswith("commit to me/own, private:")
        assert hub.repos["me/own"].private

    def test_a_bare_name_is_the_users_own(self, hub: FakeHub, draft_folder: Path):
        assert push(draft_folder, repo_id="mine").repo_id == "me/mine"
        assert "me/mine" in hub.repos

    def test_dry_run_shows_exactly_what_would_happen(self, hub: FakeHub, draft_folder: Path):
        """Catches a plan that differs from the deed, and a dry run that writes."""
        plan = push(draft_folder, dry_run=True)
        assert hub.repos == {}
        assert not [method for method, path in hub.requests if method in ("POST", "PUT")]
        done = push(draft_folder)
        files = hub.repos[ID].files()
        assert {file.path: file.read() for file in plan.files} == {
            path: body for path, body in files.items() if path != ".gitattributes"
        }
        assert str(plan).splitlines()[1:] == str(done).splitlines()[1:]
        assert "model.safetensors" in str(plan)

    def test_dry_run_needs_neither_login_nor_network(self, hub: FakeHub, draft_folder: Path, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        assert push(draft_folder, dry_run=True).remarks == ()
        hub.fail("GET", "/api/models", times=9, cut=True)
        [remark] = push(draft_folder, dry_run=True).remarks
        assert "cannot be reached" in remark

    def test_a_leaderboard_result_only_where_it_applies(self, hub: FakeHub, draft_folder: Path, pair):
        """Catches a result filed under a benchmark that was not the one measured."""
        push(draft_folder, benchmark_task="function_calling")
        entries = yaml.safe_load(hub.repos[ID].files()[".eval_results/draftkd.yaml"])
        [entry] = parse_eval_result_entries(entries)
        assert (entry.dataset_id, entry.task_id, entry.value) == ("org/prompts", "function_calling", 2.5)
        assert "greedy" in entry.notes
        upload = push(draft_folder)
        assert upload.deleted == (".eval_results/draftkd.yaml",), "a leaderboard's number of other weights"
        assert ".eval_results/draftkd.yaml" not in hub.repos[ID].files()
        write_report(draft_folder, pair, prompts={"source": "prompts.jsonl", "count": 3, "sha256": "0"})
        with pytest.raises(ValueError, match="need prompts from a benchmark on the Hub"):
            push(draft_folder, benchmark_task="function_calling")


TEMPORARY = [
    ("POST", "/commit/", {"status": 500}, "failed \\(500\\)"),
    ("POST", "/preupload/", {"status": 500}, "failed \\(500\\)"),
    ("POST", "/objects/batch", {"status": 503}, "failed \\(503\\)"),
    ("PUT", "/lfs/", {"status": 500}, "failed \\(500\\)"),
    ("PUT", "/lfs/", {"cut": True}, "connection broke|cannot be reached"),
    ("POST", "/commit/", {"cut": True}, "connection broke|cannot be reached"),
    ("POST", "/api/repos/create", {"cut": True}, "cannot be reached"),
    ("GET", f"/api/models/{ID}", {"cut": True}, "cannot be reached"),
    ("POST", "/api/repos/create", {"status": 429, "headers": {"Retry-After": "17"}}, "try again in 17 seconds"),
    ("POST", "/commit/", {"status": 429, "headers": {"Retry-After": "17"}}, "try again in 17 seconds"),
]


class TestFaults:
    @pytest.mark.parametrize(("method", "path", "fault", "message"), TEMPORARY)
    def test_a_lasting_failure_loses_nothing_and_the_second_try_succeeds(
        self, hub: FakeHub, draft_folder: Path, method: str, path: str, fault: dict, message: str
    ):
        """Catches half-uploaded repositories, changed folders and messages that say nothing."""
        before = snapshot(draft_folder)
        hub.fail(method, path, times=20, **fault)
        with pytest.raises(ConnectionError, match=message) as caught:
            push(draft_folder)
        assert "the same command" in str(caught.value)
        assert set(hub.repos.get(ID, hub.add("x/y", {})).files()) <= {".gitattributes"}
        assert snapshot(draft_folder) == before
        hub.faults.clear()
        push(draft_folder)
        assert set(hub.repos[ID].files()) >= PUBLISHED

    @pytest.mark.parametrize(
        ("method", "path", "fault"),
        [
            ("POST", "/preupload/", {"status": 500}),
            ("PUT", "/lfs/", {"cut": True}),
            ("POST", "/objects/batch", {"status": 429, "headers": {"Retry-After": "1"}}),
            ("PUT", "/lfs/", {"after": 0.5}),
        ],
    )
    def test_a_passing_failure_is_not_even_noticed(self, hub: FakeHub, draft_folder: Path, method, path, fault):
        hub.fail(method, path, times=2, **fault)
        push(draft_folder)
        assert set(hub.repos[ID].files()) >= PUBLISHED

    def test_a_card_that_cannot_be_fetched(self, hub: FakeHub, draft_folder: Path):
        """Catches FileNotFoundError: the user was told of bad usage where the Hub failed."""
        hub.add(ID, {"README.md": "# Mine\n"})
        hub.fail("HEAD", "/resolve/", times=20, status=500)
        with pytest.raises(ConnectionError, match=r"cannot be reached while looking at .*the same command tries again"):
            push(draft_folder)

    @pytest.mark.parametrize(
        ("token", "repo_id", "message"),
        [
            (READER, "guest/draft", "no right"),
            (WRITER, "other/draft", "no right"),
            ("hf_" + "x" * 34, ID, "does not accept the token"),
        ],
    )
    def test_no_right_to_write(self, hub: FakeHub, draft_folder: Path, monkeypatch, token, repo_id, message):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ValueError, match=message) as caught:
            push(draft_folder, repo_id=repo_id)
        assert "hf auth login" in str(caught.value)
        assert token not in str(caught.value)

    def test_nobody_logged_in(self, hub: FakeHub, draft_folder: Path, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(ValueError, match=r"Nobody is logged in.*hf auth login"):
            push(draft_folder)
        assert hub.requests == []

    def test_conflict(self, hub: FakeHub, draft_folder: Path):
        hub.fail("POST", "/commit/", status=409)
        with pytest.raises(ValueError, match="at the same time"):
            push(draft_folder)

    def test_offline(self, hub: FakeHub, draft_folder: Path, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
            push(draft_folder)


class TestSecrets:
    def test_no_token_leaves_the_machine(self, hub: FakeHub, draft_folder: Path, caplog):
        """Catches the token in the recorded command, a log or the plan."""
        with caplog.at_level(logging.DEBUG):
            upload = push(draft_folder)
        everything = b"".join(hub.repos[ID].files().values()) + str(upload).encode() + caplog.text.encode()
        assert WRITER.encode() not in everything
        assert "hf_***" in hub.repos[ID].files()["provenance.json"].decode()

    def test_a_token_in_a_file_stops_the_push(self, hub: FakeHub, draft_folder: Path):
        (draft_folder / "LICENSE").write_text("MIT\nhf_abcdefghijklmnopqrstuvwxyz012345\n")
        with pytest.raises(ValueError, match="LICENSE holds what looks like an access token") as caught:
            push(draft_folder)
        assert "abcdefghij" not in str(caught.value)
        assert ID not in hub.repos

    def test_a_token_with_a_line_break_is_not_printed(self, hub: FakeHub, draft_folder: Path):
        """Catches the HTTP client's error, which quotes the header it refuses."""
        with pytest.raises(ValueError, match="characters that no key contains") as caught:
            push(draft_folder, token=WRITER + "\nX: y")
        assert WRITER not in str(caught.value)

    def test_no_traceback_holds_a_token(self, hub: FakeHub, draft_folder: Path):
        """The server repeats the token in its answer; neither message nor chained exceptions may."""
        import traceback

        hub.fail("POST", "/api/repos/create", status=500, headers={"X-Error-Message": f"bad token {WRITER}"}, times=9)
        with pytest.raises(ConnectionError) as caught:
            push(draft_folder)
        assert WRITER not in "".join(traceback.format_exception(caught.value))

    def test_no_path_of_this_machine_is_published(self, hub: FakeHub, draft_folder: Path):
        replaced(draft_folder, command="draftkd train --output_dir ~/x")
        config = json.loads((draft_folder / "config.json").read_text()) | {"_name_or_path": str(draft_folder)}
        (draft_folder / "config.json").write_text(json.dumps(config))
        push(draft_folder)
        for path, body in hub.repos[ID].files().items():
            assert str(draft_folder.parent).encode() not in body, path

    def test_code_in_the_config_is_refused(self, hub: FakeHub, draft_folder: Path):
        """Catches a repository that only loads with `trust_remote_code`."""
        config = json.loads((draft_folder / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
        (draft_folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"auto_map|trust_remote_code|code"):
            push(draft_folder)


class TestCommand:
    def test_dry_run_and_push(self, hub: FakeHub, draft_folder: Path, capsys):
        arguments = ["--model", str(draft_folder), "--repo_id", ID, "--license", "mit"]
        assert push_command.run([*arguments, "--dry_run"]) == 0
        shown = capsys.readouterr().out
        assert "model.safetensors" in shown
        assert "## How much it helps" in shown
        assert "nothing was uploaded" in shown
        assert hub.repos == {}
        assert push_command.run([*arguments, "--private", "--language", "en", "de"]) == 0
        assert f"published: {hub.url}/{ID}/commit/" in capsys.readouterr().out
        assert hub.repos[ID].private
        assert DraftModelCard(hub.repos[ID].files()["README.md"].decode()).data.language == ["en", "de"]

    def test_exit_codes(self, hub: FakeHub, draft_folder: Path, capsys):
        """Bad usage is 2 (raised for the dispatcher), a failing Hub is 1."""
        with pytest.raises(UsageError, match="missing: --repo_id"):
            push_command.run(["--model", str(draft_folder)])
        with pytest.raises(UsageError, match="There is no folder"):
            push_command.run(["--model", "nowhere", "--repo_id", ID])
        hub.fail("POST", "/api/repos/create", status=500, times=9)
        assert dispatch(["push", "--model", str(draft_folder), "--repo_id", ID, "--license", "mit"]) == 1
        assert "the same command tries again" in capsys.readouterr().err
