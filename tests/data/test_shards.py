"""Shards on disk: killed, resumed, shared between processes, refused, and cut off by a full disk."""

import datetime
import json
import os
import resource
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
from datasets import load_dataset

from hf_draftkd.data import generation, shards
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.shards import StoppedError
from hf_draftkd.data.synthesis import synthesize_prompts
from hf_draftkd.models.identity import remember_checkpoint
from hf_draftkd.models.resolve import Checkpoint
from hf_draftkd.utils import files
from hf_draftkd.utils.files import only_run
from tests.data.small import TEMPLATE, make_target, make_tokenizer
from tests.data.test_synthesis import writing_target
from tests.processes import in_two_processes, started

TEXTS = [f"{'the cat ' * (number % 4)}{number}" for number in range(20)]
OPTIONS = {"max_new_tokens": 6, "temperatures": (0.0, 1.0), "batch_size": 2, "shard_size": 4, "seed": 3}


@pytest.fixture(scope="module")
def undisturbed() -> datasets.Dataset:
    """The rows of a run without a folder, whole and alone."""
    return generate_alignment_data(make_target(), make_tokenizer(), TEXTS, **OPTIONS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder that a run has finished. It is for reading: change a copy."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder.parent / "cache"))
        generate_alignment_data(make_target(), make_tokenizer(), TEXTS, output_dir=folder, **OPTIONS)
    return folder


def answer_slowly(folder: Path, seconds: float) -> None:
    """What a killed or a second process runs: the same call, slowed down so that there is a moment to kill it at."""
    answer, calls = generation.answer_shard, Path(f"{folder}.process-{os.environ.get('RANK', '0')}")

    def slow(*args, **kwargs):
        with calls.open("a") as file:
            file.write("shard\n")
        time.sleep(seconds)
        return answer(*args, **kwargs)

    generation.answer_shard = slow
    datasets.config.HF_DATASETS_CACHE = str(folder.parent / "cache")
    generate_alignment_data(make_target(), make_tokenizer(), TEXTS, output_dir=folder, **OPTIONS)


def test_a_run_killed_at_any_moment_ends_with_the_same_rows(tmp_path, target, tokenizer, undisturbed):
    """`kill -9`, twice, then a run to the end: equal row for row to one that nobody disturbed."""
    folder = tmp_path / "out"
    for shards_before in (1, 3):
        process = started(tmp_path / "log", __name__, "answer_slowly", folder, 0.4)
        while len(list(folder.glob("data/train-*"))) < shards_before:
            assert process.is_alive(), (tmp_path / "log").read_text()
            time.sleep(0.02)
        process.kill()
        process.join()
    # What a kill in the middle of a write leaves behind.
    (folder / "data" / ".train-00004-of-00005.parquet.1").write_bytes(b"PAR1 half")
    assert 3 <= len(list(folder.glob("data/train-*"))) < 5
    resumed = generate_alignment_data(target, tokenizer, TEXTS, output_dir=folder, **OPTIONS)
    assert resumed.to_list() == undisturbed.to_list()
    assert not list(folder.glob("data/.*"))
    loaded = load_dataset(str(folder), split="train")
    assert loaded.to_list() == undisturbed.to_list()
    assert loaded.features == undisturbed.features


LONG = OPTIONS | {"shard_size": 20, "cache_distributions": "top_k=4"}
FEW = TEXTS[:10]  # five batches for each of two settings


def answer_a_long_shard_slowly(folder: Path) -> None:
    """What a killed process runs: the target's batches, one line in a file as each begins."""
    target = make_target()
    generate = target.generate

    def slow(*args, **kwargs):
        with Path(f"{folder}.batches").open("a+") as file:
            file.write("batch\n")
            file.seek(0)
            begun = file.read().count("batch")
        time.sleep(0.4 if begun >= 7 else 0)  # beyond the first setting's five
        return generate(*args, **kwargs)

    target.generate = slow
    datasets.config.HF_DATASETS_CACHE = str(folder.parent / "cache")
    generate_alignment_data(target, make_tokenizer(), FEW, output_dir=folder, **LONG)


def test_a_killed_run_loses_a_batch_of_a_long_shard(tmp_path, target, tokenizer, monkeypatch):
    """`kill -9` in the middle of the only shard, of ten batches; the rows are those of an undisturbed run."""
    undisturbed = generate_alignment_data(target, tokenizer, FEW, **LONG)
    folder, batches = tmp_path / "out", tmp_path / "out.batches"
    process = started(tmp_path / "log", __name__, "answer_a_long_shard_slowly", folder)
    while not batches.exists() or batches.read_text().count("batch") < 7:
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert [path.name for path in folder.glob("data/*")] == [".train-00000-of-00001.journal"]
    begun, generate, asked = batches.read_text().count("batch"), target.generate, []
    monkeypatch.setattr(target, "generate", lambda *args, **kwargs: asked.append(1) or generate(*args, **kwargs))
    resumed = generate_alignment_data(target, tokenizer, FEW, output_dir=folder, **LONG)
    assert len(asked) <= 10 - begun + 1
    assert resumed.to_list() == undisturbed.to_list()
    assert not list(folder.glob("data/.*"))


def test_answers_under_other_settings_are_not_taken_over(tmp_path, target, tokenizer, monkeypatch):
    """A run that stopped in its first shard, begun again with a smaller length."""
    write = shards.write_parquet
    monkeypatch.setattr(shards, "write_parquet", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_alignment_data(target, tokenizer, FEW[:4], output_dir=tmp_path, **LONG)
    assert list(tmp_path.glob("data/.*.journal"))
    monkeypatch.setattr(shards, "write_parquet", write)
    other = LONG | {"max_new_tokens": 3}
    found = generate_alignment_data(target, tokenizer, FEW[:4], output_dir=tmp_path, **other)
    assert found.to_list() == generate_alignment_data(target, tokenizer, FEW[:4], **other).to_list()


def test_two_processes_write_the_rows_of_one(tmp_path, undisturbed):
    """Torchrun on CPU: each process takes its share of whole shards, and both see all of them at the end."""
    in_two_processes(tmp_path, __name__, "answer_slowly", tmp_path / "out", 0.0)
    shares = [Path(f"{tmp_path}/out.process-{rank}").read_text().count("shard") for rank in (0, 1)]
    assert shares == [3, 2]  # two that take themselves for the only one write the same rows, twice
    together = load_dataset(str(tmp_path / "out"), split="train")
    assert together.to_list() == undisturbed.to_list()


def test_only_files_of_ours_are_tidied_away(tmp_path, target, tokenizer):
    """IsADirectoryError at the end, and at each further try: a notebook had been opened in the folder."""
    notebook, note = tmp_path / "data" / ".ipynb_checkpoints", tmp_path / "data" / ".note"
    notebook.mkdir(parents=True)
    note.touch()
    (tmp_path / "manifest.json").write_text('{"schema_version": 1}')
    rows = generate_alignment_data(target, tokenizer, TEXTS[:3], output_dir=tmp_path, **OPTIONS)
    assert len(rows) == 6
    assert notebook.is_dir()
    assert note.exists()


def test_a_folder_of_other_files_gets_no_queries(tmp_path, tokenizer):
    """All queries were written into it before it was refused."""
    (tmp_path / "thesis.txt").write_text("x")
    target = make_target()
    target.generate = None
    with pytest.raises(ValueError, match=r"is not empty and holds no manifest\.json"):
        generate_alignment_data(target, tokenizer, scenario="synthetic", output_dir=tmp_path, max_new_tokens=4)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_finished_folder_is_not_answered_again(target, tokenizer, finished, undisturbed):
    target.generate = None
    again = generate_alignment_data(target, tokenizer, TEXTS, output_dir=finished, **OPTIONS)
    assert again.to_list() == undisturbed.to_list()


def test_other_package_versions_are_warned_of(tmp_path, target, tokenizer, finished, undisturbed, caplog):
    """An upgrade between two days of writing changes sampled text, and nothing would say so."""
    folder = Path(shutil.copytree(finished, tmp_path / "out"))
    manifest = json.loads((folder / shards.MANIFEST).read_text())
    manifest["versions"]["torch"] = "1.0"
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))
    again = generate_alignment_data(target, tokenizer, TEXTS, output_dir=folder, **OPTIONS)
    assert again.to_list() == undisturbed.to_list()
    assert "begun with other package versions" in caplog.text


def test_a_run_goes_on_the_next_day_where_the_template_shows_the_date(tmp_path, target, monkeypatch):
    """Catches a killed run that is refused after midnight: Llama 3.2 and gpt-oss write the date into every prompt."""
    tokenizer = make_tokenizer(TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d %b %Y %f') }}"))
    chats = [[{"role": "user", "content": text}] for text in ("cat", "mat", "on")]
    options = {"max_new_tokens": 6, "batch_size": 1, "shard_size": 1}

    class Past(datetime.date):
        @classmethod
        def today(cls):
            return cls(2020, 2, 29)

    monkeypatch.setattr(shards, "date", Past)
    first = generate_alignment_data(target, tokenizer, chats, output_dir=tmp_path / "out", **options)
    written = synthesize_prompts(writing_target(2.0), tokenizer, 2, max_new_tokens=20, output_dir=tmp_path / "queries")
    monkeypatch.undo()
    again = synthesize_prompts(writing_target(2.0), tokenizer, 2, max_new_tokens=20, output_dir=tmp_path / "queries")
    assert again[0][:] == written[0][:]
    assert tokenizer.decode(first[0]["prompt_ids"]).startswith("<s>29 Feb 2020 000000<|user|>cat")
    shards.shard_path(tmp_path / "out", 1, 3).unlink()
    assert generate_alignment_data(target, tokenizer, chats, output_dir=tmp_path / "out", **options)[:] == first[:]
    today = generate_alignment_data(target, tokenizer, chats, output_dir=tmp_path / "today", **options)
    assert today["prompt_ids"] != first["prompt_ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed: 3 there, 4 now"),
        ({"temperatures": (0.0,)}, "settings: "),
        ({"max_new_tokens": 7}, "max_new_tokens: 6 there, 7 now"),
        ({"batch_size": 4}, "batch_size: 2 there, 4 now"),
        ({"scenario": "curated"}, 'scenario: "queries" there, "curated" now'),
        ({"prompts": [*TEXTS[:-1], "another"]}, "prompts: "),
        ({"target": make_target(seed=1)}, "target_weights: "),
        ({"template": "{{ messages }}"}, "chat_template: "),
    ],
)
def test_other_settings_are_refused_with_the_difference(target, tokenizer, finished, change, message):
    """Fault 11 of the field: rows of two revisions, templates or settings of a target in one data set."""
    change = dict(change)
    target, prompts = change.pop("target", target), change.pop("prompts", TEXTS)
    tokenizer.chat_template = change.pop("template", tokenizer.chat_template)
    before = contents(finished)
    with pytest.raises(ValueError, match="begun with other settings") as refusal:
        generate_alignment_data(target, tokenizer, prompts, output_dir=finished, **{**OPTIONS, **change})
    assert message in str(refusal.value)
    assert contents(finished) == before


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("name", "reason"), [("tiny/target", "further in place"), ("tiny/other", "another model, by its weights")]
)
def test_a_target_with_other_weights_is_refused_with_what_became_of_it(tokenizer, finished, name, reason):
    """Two fingerprints say that something differs, and not whether the target was tuned or is another one."""
    other = make_target(seed=1)
    other.config.name_or_path = other.name_or_path = name
    with pytest.raises(ValueError, match=rf"the target was tiny/target \(.*{reason}"):
        generate_alignment_data(other, tokenizer, TEXTS, output_dir=finished, **OPTIONS)


def test_a_run_resumes_with_a_target_that_was_moved(tmp_path, target, tokenizer, finished, undisturbed):
    """Catches days of writing that cannot go on because the target's folder has another name."""
    folder = Path(shutil.copytree(finished, tmp_path / "out"))
    target.config.name_or_path = target.name_or_path = "elsewhere"
    remember_checkpoint(target, Checkpoint("elsewhere", "a" * 40, frozenset(), is_local=False))
    shards.shard_path(folder, 1, len(list((folder / "data").glob("*.parquet")))).unlink()
    again = generate_alignment_data(target, tokenizer, TEXTS, output_dir=folder, **OPTIONS)
    assert again["completion_ids"] == undisturbed["completion_ids"]
    assert set(again["target"]) == {*undisturbed["target"], "elsewhere"}


def test_a_folder_in_which_nothing_was_finished_starts_over(tmp_path, target, tokenizer):
    """A first try with another length, stopped before its first shard, blocks the folder for good."""
    generate_alignment_data(target, tokenizer, TEXTS[:2], output_dir=tmp_path, **OPTIONS)
    manifest = (tmp_path / "manifest.json").read_text()
    for shard in tmp_path.glob("data/*"):
        shard.rename(shard.with_name(f".{shard.name}.17"))  # as a killed run leaves it
    (tmp_path / "manifest.json").write_text(manifest.replace('"max_new_tokens": 6', '"max_new_tokens": 7'))
    generate_alignment_data(target, tokenizer, TEXTS[:2], output_dir=tmp_path, **OPTIONS)
    assert (tmp_path / "manifest.json").read_text() == manifest
    assert not list(tmp_path.glob("data/.*"))


def test_a_folder_of_other_files_is_left_alone(tmp_path, target, tokenizer):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"not empty"):
        generate_alignment_data(target, tokenizer, TEXTS, output_dir=tmp_path, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"is a file"):
        generate_alignment_data(target, tokenizer, TEXTS, output_dir=tmp_path / "thesis.tex", **OPTIONS)


@pytest.mark.parametrize("content", ['{"name": "my web app"}', "[1, 2]", ""])
def test_a_manifest_of_another_program_is_left_alone(tmp_path, target, tokenizer, content):
    """It was written over, or ended in an AttributeError, or in "Expecting value: line 1 column 1 (char 0)"."""
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds a manifest\.json of something else.*Name another folder"):
        generate_alignment_data(target, tokenizer, TEXTS, output_dir=tmp_path, **OPTIONS)
    assert (tmp_path / "manifest.json").read_text() == content


@contextmanager
def small_files(size: int):
    """No file can become larger: the errors of a full disk, on any."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_the_finished_shards_valid(tmp_path, target, tokenizer, undisturbed, monkeypatch):
    """The third shard meets a really full device; the two before it stay, and the run resumes later."""
    write = shards.write_parquet

    def onto_a_full_device(rows, path):
        if "00002-of" not in path.name:
            return write(rows, path)
        path.symlink_to("/dev/full")
        return write(rows, path)

    monkeypatch.setattr(shards, "write_parquet", onto_a_full_device)
    with pytest.raises(RuntimeError, match=r"disk is full.* 2 shards are finished"):
        generate_alignment_data(target, tokenizer, TEXTS, output_dir=tmp_path, **OPTIONS)
    assert len(list(tmp_path.glob("data/train-*"))) == 2
    monkeypatch.undo()
    resumed = generate_alignment_data(target, tokenizer, TEXTS, output_dir=tmp_path, **OPTIONS)
    assert resumed.to_list() == undisturbed.to_list()


def test_a_disk_that_is_full_from_the_start_is_named(tmp_path, target, tokenizer):
    """A traceback from pathlib."""
    with (
        small_files(100),
        pytest.raises(StoppedError, match=r"disk is full: the manifest\.json could not be written.* 0 shards"),
    ):
        generate_alignment_data(target, tokenizer, TEXTS, output_dir=tmp_path, **OPTIONS)


def test_a_full_cache_of_datasets_is_no_lost_work(tmp_path, target, tokenizer, finished, monkeypatch):
    """`An error occurred while generating the dataset`, when all prompts were answered: the cache is elsewhere."""
    folder = Path(shutil.copytree(finished, tmp_path / "out"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with small_files(100), pytest.raises(StoppedError, match=r"All shards are finished in .*set HF_DATASETS_CACHE"):
        generate_alignment_data(target, tokenizer, TEXTS, output_dir=folder, **OPTIONS)
    assert len(generate_alignment_data(target, tokenizer, TEXTS, output_dir=folder, **OPTIONS)) == 40


@pytest.mark.parametrize("size", [0, 100])
def test_a_shard_that_was_cut_off_is_named(tmp_path, target, tokenizer, finished, size):
    """`An error occurred while generating the dataset`, where a copy of the folder had met a full disk."""
    folder = Path(shutil.copytree(finished, tmp_path / "out"))
    shard = folder / "data" / "train-00001-of-00005.parquet"
    os.truncate(shard, size)
    with pytest.raises(ValueError, match=r"train-00001-of-00005\.parquet is damaged.*delete it"):
        generate_alignment_data(target, tokenizer, TEXTS, output_dir=folder, **OPTIONS)


@pytest.mark.parametrize("scenario", ["queries", "synthetic"])
def test_two_runs_into_one_folder(tmp_path, target, tokenizer, monkeypatch, scenario):
    """Rows of one under the manifest of the other: it had other settings, and found nothing finished yet."""
    monkeypatch.setattr(files, "_PATIENCE", 0)
    asked = {"queries": {"prompts": TEXTS}, "synthetic": {"scenario": "synthetic", "num_prompts": 2}}[scenario]
    with only_run(tmp_path), pytest.raises(ValueError, match=r"Another run is writing to .*choose another"):
        generate_alignment_data(target, tokenizer, output_dir=tmp_path, **OPTIONS | asked)
    assert not list(tmp_path.iterdir())


def test_the_folder_is_kept_until_the_last_shard(tmp_path, target, tokenizer, monkeypatch):
    """The other run began while this one wrote its first shard."""
    monkeypatch.setattr(files, "_PATIENCE", 0)
    answer, asked = generation.answer_shard, []

    def meanwhile(*args):
        if not asked:
            asked.append(1)
            with pytest.raises(ValueError, match="Another run is writing"):
                generate_alignment_data(target, tokenizer, TEXTS, output_dir=tmp_path, **OPTIONS | {"seed": 4})
        return answer(*args)

    monkeypatch.setattr(generation, "answer_shard", meanwhile)
    rows = generate_alignment_data(target, tokenizer, TEXTS[:4], output_dir=tmp_path, **OPTIONS)
    assert set(rows["seed"]) == {json.loads((tmp_path / "manifest.json").read_text())["seed"]} == {3}


def test_the_manifest_says_what_was_asked_for(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["target"] == "tiny/target"
    assert manifest["prompts"]["count"] == 20
    assert [setting["temperature"] for setting in manifest["settings"]] == [0.0, 1.0]
    assert {"hf_draftkd", "torch", "transformers", "datasets"} <= set(manifest["versions"])


def test_several_processes_without_a_folder_are_refused(target, tokenizer, monkeypatch):
    """Each would return a part of the rows and call it all of them."""
    from accelerate import PartialState

    monkeypatch.setattr(PartialState, "num_processes", 2, raising=False)
    state = PartialState()
    monkeypatch.setitem(state.__dict__, "num_processes", 2)
    with pytest.raises(ValueError, match="output_dir"):
        generate_alignment_data(target, tokenizer, TEXTS, **OPTIONS)
