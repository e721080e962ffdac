"""A pair in llama.cpp, vLLM and OpenVINO: what each counts beside the prediction, and whether the draft pays there.

    make engines                                              # environments (about half an hour), then this
    python examples/engines.py --environments .engines        # the demo pair, with the draft of `draftkd quickstart`
    python examples/engines.py --target_model TARGET --draft DRAFT --prompts PROMPTS.jsonl --table TABLE.md

Every step is kept in `--output_dir`; the same command goes on where a stopped one was. Speed needs a quiet machine.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, load_from_disk
from huggingface_hub import snapshot_download
from shared import cell, claim, write_json
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_draftkd import (
    evaluate_draft,
    evaluate_in_engine,
    generate_alignment_data,
    load_draft,
    load_prompts,
    load_target,
)
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.engines import ENGINES
from hf_draftkd.evaluation.engines.launch import launched
from hf_draftkd.evaluation.engines.protocol import ServedPair
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.llama_cpp import conversion_facts
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.resolve import resolve

# As a card has it: a pre-tokenizer that the converter does not know is named where llama.cpp has the same rules.
CONVERT = """
import runpy, sys
source, known, *words = sys.argv[1:]
sys.path[:0] = [source, source + "/gguf-py"]
if known:
    import conversion.base
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: known
sys.argv = [source + "/convert_hf_to_gguf.py", *words]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="engines_run")
    parser.add_argument("--environments", default=".engines", help="what `make engines` installed")
    parser.add_argument("--engines", nargs="*", default=["llama.cpp", "vllm", "openvino"])
    parser.add_argument("--target_model", default=demo_path("target"), help="a folder, or an id on the Hub")
    parser.add_argument("--draft", help="a draft of it; by default that of `draftkd quickstart`, made here")
    parser.add_argument("--prompts", default=demo_path("test.jsonl"), help="as `draftkd generate --dataset` takes them")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--num_prompts", type=int, default=80)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--num_assistant_tokens", type=int, default=4)
    parser.add_argument("--quantizations", nargs="+", default=["f32"], help="of GGUF files: f32, q8_0, q4_0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--measure_speed", action=argparse.BooleanOptionalAction, default=True, help="in transformers too"
    )
    parser.add_argument("--check_sampling", action="store_true", help="does it write the greedy text with top-k 1?")
    parser.add_argument("--table", help="also write the table to this file")
    options = parser.parse_args()
    out, environments = Path(options.output_dir), Path(options.environments).resolve()
    # Further engines and formats can be added to a run.
    open_ended = ("check_sampling", "engines", "environments", "quantizations", "table")
    claim(out, argparse.Namespace(**{name: value for name, value in vars(options).items() if name not in open_ended}))
    draft = Path(options.draft) if options.draft else quickstart(out)
    _, rows = evaluated(options, draft, out)
    for engine in options.engines:
        checked = out / f"sampling_{engine}.json"
        if options.check_sampling and not checked.exists():
            models = prepared(engine, "f32", options.target_model, draft, environments, out)
            write_json(checked, sampling(engine, options, draft, rows, models))
        for kind in options.quantizations if engine == "llama.cpp" else ["f32"]:
            done = out / f"{engine}-{kind}.json"
            if done.exists():
                continue
            models = prepared(engine, kind, options.target_model, draft, environments, out)
            report, rows = evaluated(options, draft, out, kind)
            report.engines, report.warnings = [], []
            evaluate_in_engine(
                report,
                rows,
                resolve(options.target_model).tokenizer,
                num_assistant_tokens=options.num_assistant_tokens,
                engine=engine,
                launch=True,
                engine_rounds=options.rounds,
                engine_threads=options.threads,
                **models,
            )
            report.save(done)
    table = "\n".join(lines(out))
    print(table)
    if options.table:
        Path(options.table).write_text(f"{table}\n", encoding="utf-8")


def quickstart(out: Path) -> Path:
    folder = out / "quickstart"
    if not (folder / "report.json").exists():
        words = ["quickstart", "--output_dir", str(folder), "--overwrite_output_dir"]  # of a run that was cut off
        subprocess.run([sys.executable, "-m", "hf_draftkd", *words], check=True)
    return folder / "draft"


def evaluated(
    options: argparse.Namespace, draft: Path, out: Path, kind: str = "f32"
) -> tuple[SpeculationReport, Dataset]:
    """The target's own texts, and what one pass over them predicts for every rule an engine may verify by.

    Quantised, both are other models: they are read back from their GGUF files.
    """
    checkpoint = resolve(options.target_model)

    def load(name: str) -> PreTrainedModel:
        if kind != "f32":
            return AutoModelForCausalLM.from_pretrained(out, gguf_file=f"{name}-{kind}.gguf", dtype="float32").eval()
        return load_target(checkpoint, dtype="float32") if name == "target" else load_draft(draft, dtype="float32")

    folder = out if kind == "f32" else out / f"as-{kind}"
    if not (folder / "texts").exists():
        rows = generate_alignment_data(
            load("target"),
            checkpoint.tokenizer,
            load_prompts(options.prompts, limit=options.num_prompts),
            max_new_tokens=options.max_new_tokens,
            temperatures=options.temperatures,
            batch_size=16,
        )
        rows.save_to_disk(folder / "texts")
    rows = load_from_disk(folder / "texts")
    if not (folder / "transformers.json").exists():
        report = evaluate_draft(
            load("draft"),
            load("target"),
            checkpoint.tokenizer,
            dataset=rows,
            verification=["rejection_sampling", "exact_match", "top_10_draft"],
            measure_speed=options.measure_speed and kind == "f32",
            num_assistant_tokens=options.num_assistant_tokens,
            source=options.prompts,
        )
        report.save(folder / "transformers.json")
    return SpeculationReport.load(folder / "transformers.json"), rows


def sampling(name: str, options: argparse.Namespace, draft: Path, rows: Dataset, models: dict) -> dict:
    """How often an engine that samples from the likeliest token alone, with the draft, writes its own greedy text.

    That is the same distribution, so one that draws rightly always does; rounding in a batch decides near-ties.
    """
    engine, length = ENGINES[name], options.max_new_tokens
    target, proposer = models.get("engine_models") or (str(as_folder(options.target_model)), str(draft))
    prompts = [row["prompt_ids"] for row in rows if row["temperature"] == rows[0]["temperature"]]
    pair = ServedPair(
        target,
        proposer,
        options.num_assistant_tokens,
        is_greedy=False,
        threads=options.threads,
        max_context=max(map(len, prompts)) + length + options.num_assistant_tokens + 1,
        binary=models["engine_binary"],
        dtype="float32",
    )
    with launched(engine, replace(pair, draft=None)) as url:
        greedy = [engine.complete(url, ids, DecodingSetting(), length, 0).token_ids for ids in prompts]
    found = []
    with launched(engine, pair) as url:
        for ids in prompts:
            try:
                found.append(engine.complete(url, ids, DecodingSetting(1.0, top_k=1), length, 0).token_ids)
            except (ValueError, ConnectionError):
                found.append(None)
    equal = sum(mine == theirs for mine, theirs in zip(found, greedy, strict=True))
    return {"num_prompts": len(prompts), "num_equal": equal, "num_failed": found.count(None)}


def prepared(engine: str, kind: str, target: str, draft: Path, environments: Path, out: Path) -> dict:
    """The program of an engine, and both models in its own format."""
    if engine == "vllm":
        return {"engine_binary": str(environments / "vllm/bin/python")}
    llama = environments / "llama/build/bin"
    openvino = environments / "openvino/bin"  # has torch, which llama.cpp's converter needs too
    facts = conversion_facts(resolve(target).tokenizer)
    models = []
    for name, folder in (("target", as_folder(target)), ("draft", draft)):
        if engine == "openvino":
            made = out / f"{name}-ov"
            words = [openvino / "optimum-cli", "export", "openvino", "--model", folder]
            words += ["--task", "text-generation-with-past", "--weight-format", "fp32", made]
        else:
            made = out / f"{name}-{kind}.gguf"
            source = environments / "llama/source/llama.cpp"
            words = [openvino / "python", "-c", CONVERT, source, facts.get("llama_cpp_pre_tokenizer") or "", folder]
            words += ["--outfile", made, "--outtype", kind]
            if kind not in ("f32", "f16", "bf16", "q8_0"):  # smaller ones are made of another file
                whole = out / f"{name}-f32.gguf"
                run([*words[:-3], whole, "--outtype", "f32"], whole)
                words = [llama / "llama-quantize", whole, made, kind]
        run(words, made)
        models.append(str(made))
    program = openvino / "python" if engine == "openvino" else llama / "llama-server"
    return {"engine_binary": str(program), "engine_models": models}


def run(words: list, made: Path) -> None:
    """Run a command that makes a file or folder, unless it is there whole."""
    if not made.exists():
        unfinished = made.with_name(f"_unfinished-{made.name}")
        command = [str(unfinished if word == made else word) for word in words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        unfinished.rename(made)


def as_folder(target: str) -> Path:
    return Path(target if Path(target).is_dir() else snapshot_download(target))


def lines(out: Path) -> Iterator[str]:
    """The table, and below it what could not be measured."""
    heads = ["engine", "decoding", "texts equal", "tokens per call, counted", "predicted", "accepted", "plain tokens/s"]
    heads += ["with the draft", "speed-up", "best γ there"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    report = SpeculationReport.load(out / "transformers.json")
    for setting in report.settings:
        if setting.is_transformers_rule:
            for way, run in (("assistant_model=", setting.assisted), ("SpeculativeDecoding", setting.speculative)):
                if run is not None:
                    yield row(
                        f"transformers, {way}",
                        setting.decoding,
                        "" if run.num_identical is None else f"{run.num_identical} of {run.num_prompts}",
                        f"{run.mean_acceptance_length:.2f}",
                        setting.block_efficiency[run.num_assistant_tokens],
                        run.draft_acceptance_rate,
                        run,
                        setting.recommendation.num_assistant_tokens,
                    )
    notes = []
    for path in sorted(out.glob("*-*.json")):
        report = SpeculationReport.load(path)
        notes += report.warnings
        for found in report.engines or []:
            yield row(
                f"{found.engine} {found.version} {path.stem.rpartition('-')[2]}",
                found.decoding,
                "" if found.num_identical is None else f"{found.num_identical} of {found.num_prompts}",
                cell(vars(found.mean_acceptance_length)),
                found.predicted_mean_acceptance_length,
                found.draft_acceptance_rate,
                found,
                found.recommendation.num_assistant_tokens,
            )
    for path in sorted(out.glob("sampling_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        notes.append(
            f"{path.stem.partition('_')[2]}, sampling with the draft from the likeliest token alone, wrote its own "
            f"greedy text for {found['num_equal']} of {found['num_prompts']} prompts, and failed for "
            f"{found['num_failed']}."
        )
    for note in dict.fromkeys(notes):
        yield f"\nNote: {note}"


def row(name, decoding, equal, counted, predicted, accepted, run, best) -> str:
    cells = [name, decoding, equal, counted, "" if predicted is None else cell(vars(predicted)), f"{accepted:.3f}"]
    cells += [f"{run.plain_tokens_per_second:.0f}", f"{run.tokens_per_second:.0f}", cell(vars(run.speedup)), best]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
