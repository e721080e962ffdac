"""Step 8: the tables of the README, from the results that the steps left.

python examples/smollm2/report.py --results_dir WORK/results
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

LENGTHS, MANY_LENGTHS = (1, 3, 5, 8), (1, 2, 3, 4, 5)
GOAL, SHARE = 2.4, 0.12


@dataclass
class Options:
    """Where the results lie."""

    results_dir: str = field(
        default=str(Path(__file__).with_name("results")), metadata={"help": "Folder of the results."}
    )


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """A result, or None where its step was not run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def cell(estimate: dict[str, float]) -> str:
    """A value with its 95% interval, where there are several texts."""
    between = f" ({estimate['low']:.2f} to {estimate['high']:.2f})" if "low" in estimate else ""
    return f"{estimate['value']:.2f}{between}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def setting_name(setting: dict[str, Any]) -> str:
    return "greedy" if setting["decoding"]["temperature"] == 0 else f"T = {setting['decoding']['temperature']:g}"


def by_length(estimates: dict[str, Any]) -> list[str]:
    """Tokens per target call by draft length; a draft in one pass has none beyond the tokens that it was taught."""
    return [cell(estimates[str(length)]) if str(length) in estimates else "" for length in LENGTHS]


def own_list(setting: dict[str, Any]) -> dict[str, Any]:
    """The setting's result with the draft's list of tokens, as `SpeculativeDecoding` uses it; the last is the whole."""
    *listed, _ = setting["draft_vocabulary"]
    return listed[-1]


def domain(folder: Path, names: list[str]) -> str:
    """Every draft on GSM8K: acceptance, and tokens per target call by draft length, with each list of tokens."""
    results = {name: read(folder, f"{name}-gsm8k_test") for name in names}
    reports = {name: result["report"] for name, result in results.items() if result}
    if not reports:
        return ""
    rows = []
    for name, report in reports.items():
        for setting in report["settings"]:
            for found in setting.get("draft_vocabulary", [setting]):
                size = f"{found['size']:,}" if "size" in found else "all"
                alpha = cell(found["acceptance_rate"])
                rows.append([name, setting_name(setting), size, alpha, *by_length(found["block_efficiency"])])
                if "parallel_block_efficiency" in found:
                    tau = by_length(found["parallel_block_efficiency"])
                    rows.append([f"{name}, in one pass", setting_name(setting), size, "", *tau])
    return table(["draft", "setting", "tokens it may propose", "α", *(f"τ({length})" for length in LENGTHS)], rows)


def by_task(folder: Path, name: str) -> str:
    """Mean accepted tokens with 5 drafted ones by task of Spec-Bench, the target's own token counted; whole head."""
    result = read(folder, f"{name}-spec_bench")
    if result is None:
        return ""
    tasks = result["report"]["groups"] | {"all": result["report"]["settings"]}
    rows = [
        [task, str(settings[0]["num_texts"])] + [cell(each["block_efficiency"]["5"]) for each in settings]
        for task, settings in tasks.items()
    ]
    return table(["task", "questions", *(setting_name(each) for each in result["report"]["settings"])], rows)


def compared(folder: Path, name: str = "compared") -> str:
    """Drafts of several seeds, each named GROUP-SEED: a row for each group, setting and way of drafting."""
    result = read(folder, name)
    if result is None:
        return ""
    drafts = {Path(each["draft"]["name"]).name: each["settings"] for each in result["report"]["drafts"]}
    rows = []
    for group in dict.fromkeys(map(group_of, drafts)):
        found = [settings for name, settings in drafts.items() if group_of(name) == group]
        trained = [read(folder, name) for name in drafts if group_of(name) == group]
        steps = sorted({each["log"][-1]["step"] for each in trained})
        took = spread([each["seconds"] for each in trained], 0)
        told = f"{group} ({'/'.join(map(str, steps))} steps, {took} s)"
        for index, setting in enumerate(found[0]):
            for way, key in (("one by one", "block_efficiency"), ("in one pass", "parallel_block_efficiency")):
                taus = [own_list(settings[index]).get(key) for settings in found]
                if None not in taus:
                    by_length = [
                        [tau[str(length)]["value"] for tau in taus if str(length) in tau] for length in MANY_LENGTHS
                    ]
                    cells = [spread(values) if values else "" for values in by_length]
                    rows.append([told, str(len(found)), setting_name(setting), way, *cells])
    return table(["trained", "seeds", "setting", "drafts", *(f"τ({length})" for length in MANY_LENGTHS)], rows)


def by_depth(folder: Path, name: str = "compared") -> str:
    """How often a parallel draft's token is right at each depth, given that those before it were; whole head."""
    result = read(folder, name)
    groups: dict[tuple[str, str], list[list[float]]] = {}
    for each in result["report"]["drafts"] if result else ():
        for setting in each["settings"]:
            if "parallel" in setting:
                depths = [estimate["value"] for estimate in setting["parallel"]["acceptance_by_depth"]]
                key = (group_of(Path(each["draft"]["name"]).name), setting_name(setting))
                groups.setdefault(key, []).append(depths)
    rows = [
        [*key, str(len(found)), *(spread(depth) for depth in zip(*found, strict=True))] for key, found in groups.items()
    ]
    return (
        table(["draft", "setting", "seeds", *(f"depth {n + 1}" for n in range(len(rows[0]) - 3))], rows) if rows else ""
    )


def group_of(name: str) -> str:
    """What drafts of several seeds have in common."""
    return re.sub(r"-\d+$", "", name)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """A mean, with the lowest and the highest."""
    between = f" [{min(values):.{digits}f}, {max(values):.{digits}f}]" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{between}"


def speed(folder: Path) -> str:
    """Real decoding by draft, setting and way; of several seeds the mean with the lowest and highest."""
    ways: dict[tuple[str, ...], list[Any]] = {}
    for path in sorted(folder.glob("speed-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))["report"]
        name, _, dtype = path.stem.removeprefix("speed-").rpartition("-")
        latency, threads = report["latency"], report["hardware"]["num_threads"]
        # transformers' own loop uses the whole head; `SpeculativeDecoding` the draft's list, the largest size.
        whole, listed = latency["draft_step_seconds"], latency["listed_draft_seconds"]
        listed, in_one_pass = listed[max(listed, key=int)], latency.get("parallel_draft_seconds", {})
        for setting in report["settings"]:
            for way, found, seconds in (
                ("`assistant_model=`", setting.get("assisted"), whole),
                ("`SpeculativeDecoding`", setting.get("speculative"), listed),
                ("`SpeculativeDecoding`, in one pass", setting.get("parallel", {}).get("speculative"), None),
            ):
                if found is None:
                    continue
                length = found["num_assistant_tokens"]
                cost = (in_one_pass[str(length)] if seconds is None else seconds) / latency["target_step_seconds"]
                counted, plain = found["mean_acceptance_length"], found["plain_tokens_per_second"]
                key = (f"{group_of(name)}, {dtype}", str(threads), setting_name(setting), way)
                run = (length, counted, plain, found["predicted_speedup"], found["speedup"], cost)
                ways.setdefault(key, []).append(run)
    rows = []
    for key, runs in ways.items():
        lengths, counts, plains, predicted, speedups, costs = zip(*runs, strict=True)
        gains = cell(speedups[0]) if len(runs) == 1 else spread([each["value"] for each in speedups])
        lengths = "/".join(map(str, sorted(set(lengths))))
        told = [*key, str(len(runs)), lengths, spread(counts), spread(plains, 0)]
        rows.append([*told, spread(predicted), gains, spread(costs)])
    heads = ["draft", "threads", "setting", "way", "seeds", "γ", "counted tokens per call", "plain tokens/s"]
    heads += ["speed-up, predicted", "measured", "pass of the draft ÷ step of the target"]
    return table(heads, rows) if rows else ""


def verdict(folder: Path, name: str) -> str:
    """The goal, and which of acceptance and cost is to blame where it is missed."""
    result = read(folder, f"{name}-gsm8k_test")
    cost = read(folder, "draft")
    if result is None or cost is None:
        return ""
    found = own_list(result["report"]["settings"][0])
    tau = found["block_efficiency"]["5"]
    reached = "reached" if tau["value"] >= GOAL else f"missed by {GOAL - tau['value']:.2f}"
    share = cost["share_of_bytes"]
    cheap = "kept" if share <= SHARE else f"exceeded by {share - SHARE:.3f}"
    return (
        f"Goal: τ(5) of {GOAL} greedy on GSM8K: {cell(tau)}, {reached}. Bytes read a step, at most {SHARE} of the "
        f"target's: {share:.3f}, {cheap}.\n\n{covered(folder, name)}"
    )


def covered(folder: Path, name: str) -> str:
    """What a perfect draft with this list could be accepted at, at most, where rejection is certain outside it."""
    found = {each: read(folder, f"{name}-{each}-coverage") for each in ("gsm8k_test", "spec_bench")}
    rows = [[each, f"{of['tokens']:,}", f"{of['coverage']:.1%}"] for each, of in found.items() if of]
    return table(["answers to", "tokens on the list", "of the answers' tokens"], rows) if rows else ""


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    folder = Path(options.results_dir)
    print(verdict(folder, "distilled"))
    print(domain(folder, ["distilled", "parallel"]))
    print(by_task(folder, "distilled"))
    print(compared(folder))
    print(by_depth(folder))
    print(speed(folder))


if __name__ == "__main__":
    main()
