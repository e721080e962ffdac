"""Publishing alignment data again, from elsewhere, over what people wrote, and where it must not be seen."""

import io
import json
import shutil
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard, HfApi

from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.hub.dataset_card import push_alignment_data
from tests.data.small import make_target, make_tokenizer
from tests.hub.conftest import snapshot
from tests.hub.fake_hub import FakeHub

# huggingface_hub 2.4 sends LFS parts as `data=`, which its own HTTP client deprecates; users upload through Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

ID = "me/mats"
TEXTS = ["the cat", "sat", "on", "the mat", "cats", "mats"]


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))


def generate(folder: Path, prompts: list[str], target: str = "tiny/target", **options):
    model = make_target()
    model.name_or_path = target
    options = {"max_new_tokens": 3, "batch_size": 2, "shard_size": 2, "output_dir": folder} | options
    return generate_alignment_data(model, make_tokenizer(), prompts, **options)


@pytest.fixture(scope="module")
def _generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder.parent / "datasets_cache"))
        generate(folder, TEXTS)
    return folder


@pytest.fixture
def rows(_generated: Path, tmp_path: Path) -> datasets.Dataset:
    """Those of the folder `a`."""
    shutil.copytree(_generated, tmp_path / "a")
    return generate(tmp_path / "a", TEXTS)  # finished, so they are read


def rows_of(hub: FakeHub) -> list[dict]:
    files = hub.repos[ID].files()
    shards = sorted(name for name in files if name.startswith("data/train-"))
    return [row for name in shards for row in pq.read_table(io.BytesIO(files[name])).to_pylist()]


def card_of(hub: FakeHub) -> str:
    return hub.repos[ID].files()["README.md"].decode()


def edit(hub: FakeHub, card: str) -> None:
    hub.repos[ID].commit(hub.repos[ID].files() | {"README.md": card.encode()}, "edit on the Hub")


def test_no_rows_of_an_earlier_push_stay(hub: FakeHub, tmp_path: Path, rows):
    """Catches old shards beside the new ones: `load_dataset` would return rows that the card does not speak of."""
    push_alignment_data(tmp_path / "a", ID, rows=rows)
    assert len(rows_of(hub)) == 6
    repo = hub.repos[ID]
    repo.commit(repo.files() | {"data/test-00000-of-00001.parquet": b"mine", "notes.md": b"mine"}, "own files")
    before = len(repo.messages)
    push_alignment_data(tmp_path / "b", ID, rows=generate(tmp_path / "b", ["new one", "new two"]))
    assert [row["prompt"] for row in rows_of(hub)] == ["new one", "new two"]
    assert "2 completions of 2 prompts" in card_of(hub)
    assert {"data/test-00000-of-00001.parquet", "notes.md"} <= set(repo.files())
    assert len(repo.messages) == before + 1, "one commit: nobody ever sees half of each"


def test_the_same_push_again_changes_nothing(hub: FakeHub, tmp_path: Path, rows):
    push_alignment_data(tmp_path / "a", ID, rows=rows)
    messages = list(hub.repos[ID].messages)
    push_alignment_data(tmp_path / "a", ID, rows=rows)
    assert hub.repos[ID].messages == messages


def test_licence_and_words_are_kept(hub: FakeHub, tmp_path: Path, rows):
    """Catches a rerun that publishes data without the licence somebody gave them, and without what they wrote."""
    push_alignment_data(tmp_path / "a", ID, rows=rows)
    edit(hub, card_of(hub).replace("---\n", "---\nlicense: cc-by-4.0\n", 1) + "\nWords on the Hub.\n")
    local = tmp_path / "a" / "README.md"
    local.write_text(local.read_text().replace("---\n", "---\npretty_name: Mats\n", 1))
    push_alignment_data(tmp_path / "a", ID, rows=rows)
    card = DatasetCard(card_of(hub))
    assert (card.data.license, card.data.pretty_name) == ("cc-by-4.0", "Mats")
    assert card.text.endswith("\nWords on the Hub.\n")
    # From another folder, with other numbers.
    push_alignment_data(tmp_path / "b", ID, rows=generate(tmp_path / "b", TEXTS[:2]))
    card = DatasetCard(card_of(hub))
    assert card.data.license == "cc-by-4.0"
    assert "Words on the Hub." in card.text
    assert "2 completions of 2 prompts" in card.text
    assert "6 completions" not in card.text


def test_words_in_the_folder_are_published(hub: FakeHub, tmp_path: Path, rows):
    push_alignment_data(tmp_path / "a", ID, rows=rows)
    local = tmp_path / "a" / "README.md"
    local.write_text(local.read_text().replace("---\n", "---\nlicense: mit\n", 1) + "\nMy own words.\n")
    push_alignment_data(tmp_path / "a", ID, rows=rows)
    assert DatasetCard(card_of(hub)).data.license == "mit"
    assert "My own words." in card_of(hub)


@pytest.mark.parametrize(
    ("here", "there", "what"),
    [("\nHERE\n", "\nTHERE\n", "the text"), ("license: mit\n", "license: gpl\n", "`license`")],
)
def test_words_on_both_sides_are_never_chosen_silently(hub: FakeHub, tmp_path: Path, rows, here, there, what):
    push_alignment_data(tmp_path / "a", ID, rows=rows)

    def edited(text: str, words: str) -> str:
        return text + words if words.startswith("\n") else text.replace("---\n", f"---\n{words}", 1)

    local, before = tmp_path / "a" / "README.md", card_of(hub)
    local.write_text(edited(local.read_text(), here))
    edit(hub, edited(before, there))
    held = hub.repos[ID].files()
    with pytest.raises(ValueError, match=f"differently \\({what}\\).*prose='hub'"):
        push_alignment_data(tmp_path / "a", ID, rows=rows)
    assert hub.repos[ID].files() == held
    push_alignment_data(tmp_path / "a", ID, rows=rows, prose="hub")
    assert there.strip() in card_of(hub)
    push_alignment_data(tmp_path / "a", ID, rows=rows, prose="local")
    assert here.strip() in card_of(hub)
    assert there.strip() not in card_of(hub)
    with pytest.raises(ValueError, match="`prose` 'mine'"):
        push_alignment_data(tmp_path / "a", ID, rows=rows, prose="mine")


def test_a_repository_made_by_hand_gets_the_whole_card(hub: FakeHub, tmp_path: Path, rows):
    """Catches a card without a title: the Hub's form for a new repository writes metadata alone."""
    hub.add(ID, {"README.md": "---\nlicense: mit\n---\n"})
    push_alignment_data(tmp_path / "a", ID, rows=rows)
    card = DatasetCard(card_of(hub))
    assert card.data.license == "mit"
    assert card.text == DatasetCard.load(tmp_path / "a" / "README.md").text
    assert card.text.startswith("\n# Alignment data\n")


def test_a_broken_card_on_the_hub_is_not_replaced(hub: FakeHub, tmp_path: Path, rows):
    hub.add(ID, {"README.md": "---\ntags: [a\n---\nmy words\n"})
    with pytest.raises(ValueError, match=r"metadata of the card of me/mats cannot be read"):
        push_alignment_data(tmp_path / "a", ID, rows=rows)
    assert "my words" in card_of(hub)


def test_an_edit_in_between_is_not_lost(hub: FakeHub, tmp_path: Path, rows, monkeypatch: pytest.MonkeyPatch):
    push_alignment_data(tmp_path / "a", ID, rows=rows)
    original = HfApi.create_commit

    def meanwhile(self, *args, **kwargs):
        edit(hub, "# edited meanwhile\n")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", meanwhile)
    with pytest.raises(ValueError, match="at the same time"):
        push_alignment_data(tmp_path / "b", ID, rows=generate(tmp_path / "b", TEXTS[:2]))
    assert card_of(hub) == "# edited meanwhile\n"


@pytest.mark.parametrize("begun_as", ["acme/target", "/home/acme/target"])
def test_a_target_that_was_moved_meanwhile_has_one_name(hub: FakeHub, tmp_path: Path, begun_as: str):
    """Catches the home directory in rows of a run that went on with the same weights in another place."""
    generate(tmp_path / "a", TEXTS, target=begun_as)
    next((tmp_path / "a" / "data").glob("train-00001*")).unlink()
    rows = generate(tmp_path / "a", TEXTS, target="/home/me/secret/target")
    assert set(rows["target"]) == {begun_as, "/home/me/secret/target"}
    push_alignment_data(tmp_path / "a", ID, rows=rows)
    public = "acme/target" if begun_as == "acme/target" else "path/to/target"
    assert {row["target"] for row in rows_of(hub)} == {public}


@pytest.mark.parametrize("is_relative", [False, True])
def test_no_path_of_this_machine_is_published(hub: FakeHub, tmp_path: Path, monkeypatch, is_relative: bool):
    """Catches a home directory in every row, and a relative path that reads like a stranger's repository elsewhere."""
    home = tmp_path / "home"
    (home / "acme" / "secret").mkdir(parents=True)
    monkeypatch.chdir(home)
    name = "acme/secret" if is_relative else str(home / "acme" / "secret")
    options = {"cache_distributions": {"top_k": 4}, "source": str(home / "acme" / "prompts.jsonl")}
    rows = generate(tmp_path / "a", TEXTS, target=name, **options)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path / "a")
    push_alignment_data(tmp_path / "a", ID, rows=rows)
    assert all(b"acme" not in body for body in hub.repos[ID].files().values())
    assert {row["target"] for row in rows_of(hub)} == {"path/to/secret"}
    assert "`path/to/secret`" in card_of(hub)
    assert "`path/to/prompts.jsonl`" in card_of(hub)
    # Nothing else changed on the way: same features, same numbers.
    first = "data/train-00000-of-00003.parquet"
    published = tmp_path / "published.parquet"
    published.write_bytes(hub.repos[ID].files()[first])
    there, here = (datasets.Dataset.from_parquet(str(path)) for path in (published, tmp_path / "a" / first))
    assert there.features == here.features
    assert there.remove_columns("target").to_list() == here.remove_columns("target").to_list()
    # The data here know their target by its path, and nothing of the upload is left.
    after = snapshot(tmp_path / "a")
    assert {path for path in before if before[path] != after.get(path)} <= {"README.md"}
    assert set(after) == {*before, "README.md"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"README.md", "data", "manifest.json"}
    assert json.loads(after["manifest.json"])["target"] == name


def test_a_wish_for_privacy_never_ends_in_public(hub: FakeHub, tmp_path: Path, rows):
    """Catches `--private` that uploads into a repository that everybody can see."""
    hub.add(ID, {"README.md": "# mine"})
    with pytest.raises(ValueError, match="me/mats exists and is public"):
        push_alignment_data(tmp_path / "a", ID, rows=rows, private=True)
    assert not hub.objects
    assert card_of(hub) == "# mine"
    push_alignment_data(tmp_path / "a", "me/own", rows=rows, private=True)
    assert hub.repos["me/own"].private
