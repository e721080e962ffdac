"""Every benchmark runs as its docstring says, at a size that shows nothing but that it does."""

import importlib
import shlex

import pytest

from tests.cli.run import ROOT
from tests.processes import python, run

BENCHMARKS = ROOT / "examples" / "benchmarks"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("generation_throughput.py", "--prompts 4 --batch_size 2 --max_new_tokens 8 --repeats 1"),
        (
            "decoding.py",
            "--prompts 2 --max_new_tokens 4 --batch_sizes 1 2 --temperatures 0 --target_model {pair}/target",
        ),
        ("generation_memory.py", "--prompts 16 32"),
        (
            "kept_distributions.py",
            "--num_prompts 4 --batch_size 2 --max_new_tokens 8 --repeats 1 --target {pair}/target",
        ),
        (
            "ablation.py",
            "--jobs 0 --steps 1 --batch_size 2 --seeds 1 --train 2 --held_out 2 --max_new_tokens 4 "
            "--cells default 'cached 64'",
        ),
        (
            "result_per_second.py",
            "--jobs 0 --marks 0.1 0.2 --batch_size 2 --seeds 1 --train 2 --held_out 2 --max_new_tokens 4 --rates 3e-4 "
            "--contenders 'ours, default'",
        ),
    ],
)
def test_the_benchmark_runs(script, options, small_pair, tmp_path):
    """A script behind a number that no longer runs, so that nobody can measure it again."""
    options = [word.format(pair=small_pair) for word in shlex.split(options)]
    assert run(BENCHMARKS / script, *options, cwd=tmp_path).strip()


def test_the_table_of_architectures_says_what_works_and_what_is_refused(tmp_path):
    """A fault of one step that is printed as a success, or the reverse."""
    printed = run(BENCHMARKS / "architectures.py", "--only", "llama", "mamba", cwd=tmp_path)
    assert "1 of 2 architectures pass every step: llama." in printed
    assert "| model | refused: keeps a running state" in printed
    assert "cannot use it for speculative decoding | mamba |" in printed
    assert len((tmp_path / "architectures.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("ablation.py", ["--report", "--output_dir", "typo"], "nothing was run in"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(script, options, said, tmp_path):
    """A table of nothing under sizes that nobody ran, or a traceback after minutes of decoding."""
    done = python(BENCHMARKS / script, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


TINY = "--vocab_size 300 --batch_size 2 --prompt_tokens 4 --completion_tokens 4 --draft_width 64 --steps 1 --rounds 1"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (
            "training_throughput.py",
            ["--target_width", "64", "--target_layers", "1", "--contenders", "ours, forward_kl", "GKDTrainer"],
        ),
        ("cached_throughput.py", ["--top_k", "8"]),
    ],
)
def test_a_throughput_benchmark_prints_its_ratio(script, options, tmp_path):
    """A trainer that no longer runs beside ours, or a table without the ratio it is made for."""
    results = tmp_path / "results.jsonl"
    printed = run(BENCHMARKS / script, *TINY.split(), *options, "--results", results, cwd=tmp_path)
    assert "times the throughput of" in printed
    assert len(results.read_text().splitlines()) == 2


def test_a_benchmark_goes_on_from_its_results(tmp_path, monkeypatch):
    """An hour of measuring that begins again, or numbers of another job taken for those asked for."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    processes = importlib.import_module("processes")
    started = []

    def measure(script, job):
        started.append(job["size"])
        return {"seconds": [float(len(started))]}

    monkeypatch.setattr(processes, "in_own_process", measure)
    file = tmp_path / "results.jsonl"
    first = processes.rounds("a.py", {"x": {"size": 1}}, 2, file)
    file.write_text(file.read_text() + '{"cut off')
    again = processes.rounds("a.py", {"x": {"size": 1}, "y": {"size": 2}}, 2, file)
    assert started == [1, 1, 2, 2]
    assert again["x"] == first["x"] == [{"seconds": [1.0]}, {"seconds": [2.0]}]
    assert processes.rounds("b.py", {"x": {"size": 1}}, 1, file)["x"] == [{"seconds": [5.0]}]
