"""The harness of all claims: cells that are run once, each with its own file of results, over as many days as it takes.

A cell is a recipe at one learning rate with one seed. Its result is one JSON file under `--results_dir`, in a folder
named after the weights of the pair, written whole or not at all; a cell whose file is there is not run again, and one
that another claim needs too is run once. Rates are tried with the first seed; the best on the dev queries (acceptance,
mean of both temperatures) is run with the other seeds. Drafts are trained one by one and scored a few at a time, since
the target then reads its own texts once for all of them.
"""

import argparse
import datetime
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Protocol

import torch
from lab import FACTS, Lab, pair_id
from recipes import SIZES, TEMPERATURES, Recipe, Sizes, cell_name
from scoring import own_loss, scores
from verdicts import Comparison, Finding, findings

from hf_draftkd import load_draft
from hf_draftkd.evaluation.environment import processor_name
from hf_draftkd.models.demo import DEMO
from hf_draftkd.utils.files import write_text
from hf_draftkd.utils.versions import package_versions

HERE = Path(__file__).resolve().parent
RATES = (3e-3, 1.5e-3, 6e-4)  # 1, 1/2 and 1/5
SCORED_TOGETHER = 10
LOWER_RATES: dict[str, Any] = {
    "type": float,
    "nargs": "+",
    "default": (),
    "metavar": "RATE",
    "help": "further learning rates, for a pair that does best at the smallest; not for arms of one rate",
}
# Processor seconds before any cell was run: a step of each kind, and the scores of a draft.
_GUESS, _SCORING = {"kept": 0.08, "live": 0.4, "written": 0.75}, 10.0


class Experiment(Protocol):
    """A cell that is no draft to be trained and scored: it measures what it likes."""

    name: str
    needs_data: bool
    predicted_seconds: float

    def measure(self, lab: Lab, seed: int) -> dict[str, Any]:
        """The result, to be stored beside the provenance."""
        ...


@dataclass(frozen=True)
class Arm:
    """What is compared: a recipe, at the best of some rates. An experiment, or a draft left alone, has no rate."""

    what: Recipe | Experiment
    rates: tuple[float, ...] = RATES
    is_seeded: bool = True


@dataclass(frozen=True)
class Claim:
    """What a paper says, and the arms that can tell.

    Attributes:
        name: `A3`.
        says: The claim in one sentence.
        source: Where it is made.
        arms: Label -> arm.
        comparisons: Which arms are compared, and what the paper found.
        notes: What a reader must know of how it was tried here.
    """

    name: str
    says: str
    source: str
    arms: dict[str, Arm]
    comparisons: tuple[Comparison, ...] = ()
    notes: str = ""

    def findings(self, arms: dict[str, list[dict[str, Any]]]) -> list[Finding]:
        """The rows of the table of verdicts; a claim that no comparison of two arms decides overrides this."""
        return findings(self.comparisons, arms, list(TEMPERATURES))

    def table(self, arms: dict[str, list[dict[str, Any]]]) -> str:
        """A table of its own beside that of arms, in Markdown."""
        return ""


@dataclass(frozen=True)
class Cell:
    """One run."""

    what: Recipe | Experiment
    rate: float | None
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return cell_name(self.what, self.rate, self.seed)

    @property
    def description(self) -> dict[str, Any]:
        """What a result must have been made with to count."""
        what = asdict(self.what) if isinstance(self.what, Recipe) else {"name": self.what.name}
        return json.loads(json.dumps({"what": what, "rate": self.rate, "seed": self.seed}))


class Results:
    """The files of one pair, and of runs of one size.

    Args:
        folder: Where each pair has its folder.
        weights: The checksums of the pair's weights.
        sizes: How much of everything.
        lower_rates: Tried by every arm that has a choice of rates, beside its own.
    """

    def __init__(
        self, folder: Path, weights: dict[str, str], sizes: Sizes, lower_rates: tuple[float, ...] = ()
    ) -> None:
        self.folder, self.weights, self.sizes = folder / pair_id(weights), weights, sizes
        self.lower_rates = lower_rates

    def rates(self, arm: Arm) -> tuple[float, ...]:
        """The rates that an arm is tried at."""
        return arm.rates + self.lower_rates if len(arm.rates) > 1 else arm.rates

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell, None where there is none.

        Raises:
            SystemExit: The file is of something else under the same name.
        """
        path = self.path(cell)
        if not path.exists():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))
        sizes = asdict(self.sizes) | {"general": result["sizes"]["general"]}
        wanted = {"cell": cell.description, "pair": self.weights, "sizes": sizes}
        unlike = [key for key, value in wanted.items() if result[key] != value]
        if unlike:
            raise SystemExit(
                f"{path} was made with another {' and another '.join(unlike)} than the scripts say now. "
                "Restore them, or remove the file to run the cell again."
            )
        return result

    def put(self, cell: Cell, result: dict[str, Any]) -> None:
        """Write a result with where it comes from."""
        whole = {
            "cell": cell.description,
            "pair": self.weights,
            "sizes": asdict(self.sizes),
            "provenance": {
                "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "commit": _commit(),
                "versions": package_versions(),
                "processor": processor_name(),
                "threads": torch.get_num_threads(),
            },
            **result,
        }
        write_text(self.path(cell), json.dumps(whole, separators=(",", ":")) + "\n")

    def best_rate(self, arm: Arm) -> float | None:
        """The rate whose first seed does best on the dev queries; None before all are there."""
        found = {rate: self.get(Cell(arm.what, rate, 0)) for rate in self.rates(arm)}
        if not found or None in found.values():
            return None
        return max(found, key=lambda rate: dev_acceptance(found[rate]))  # type: ignore[arg-type]

    def of_arm(self, arm: Arm, seeds: int) -> list[dict[str, Any]]:
        """The results of an arm at its best rate, in the order of the seeds, up to the first that is missing."""
        rate = self.best_rate(arm)
        if arm.rates and rate is None:
            return []
        found = []
        for seed in range(seeds if arm.is_seeded else 1):
            result = self.get(Cell(arm.what, rate, seed))
            if result is None:
                break
            found.append(result)
        return found


def dev_acceptance(result: dict[str, Any]) -> float:
    """Mean acceptance rate on the dev queries, over both temperatures."""
    tables = result["scores"]["dev"].values()
    return mean(sum(table["acceptance"]) / sum(table["tokens"]) for table in tables)


def cells(claims: Sequence[Claim], results: Results, seeds: int, has_data: bool = True) -> Iterator[Cell]:
    """What the claims need, as far as it can be told yet: first seeds at every rate, then the others at the best.

    Without public prompts (`has_data`), cells that need them are left out.
    """
    seen = set()
    for claim in claims:
        wanted = [Cell(arm.what, rate, 0) for arm in claim.arms.values() for rate in results.rates(arm) or (None,)]
        for seed in range(1, seeds):
            for arm in claim.arms.values():
                rate = results.best_rate(arm) if arm.rates else None
                if arm.is_seeded and not (arm.rates and rate is None):
                    wanted.append(Cell(arm.what, rate, seed))
        for cell in wanted:
            if cell.name not in seen and (has_data or isinstance(cell.what, Recipe) or not cell.what.needs_data):
                seen.add(cell.name)
                yield cell


def predicted_seconds(cell: Cell, results: Results) -> float:
    """From what cells of its kind took, else a guess; scoring included."""
    if not isinstance(cell.what, Recipe):
        took = [each["seconds"] for each in _stored(results.folder, f"{cell.what.name}_*")]
        return median(took) if took else cell.what.predicted_seconds
    took = [each for each in _stored(results.folder, "*") if each.get("kind") == cell.what.kind and each["steps"]]
    a_step = median(each["seconds"] / each["steps"] for each in took) if took else _GUESS[cell.what.kind]
    answers = 1 if cell.what.text == "fixed" else len(TEMPERATURES)
    rows = answers * cell.what.prompts * results.sizes.prompts
    return cell.what.epochs * rows / results.sizes.batch_size * a_step + _SCORING


def _stored(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"{pattern}.json")]


def run_cells(lab: Lab, batch: Sequence[Cell], results: Results, deadline: float = math.inf) -> list[Cell]:
    """Train, score and store cells.

    Args:
        lab: The pair.
        batch: The cells.
        results: Where they are stored.
        deadline: When to start no further one, in seconds of `time.monotonic`.

    Returns:
        Those that are done.
    """
    done: list[Cell] = []
    trained: list[tuple[Cell, Recipe, Path]] = []
    for cell in batch:
        if time.monotonic() > deadline:
            break
        done.append(cell)
        if isinstance(cell.what, Recipe):
            trained.append((cell, cell.what, lab.trained(cell.what, cell.rate, cell.seed)))
            continue
        began = time.process_time()
        found = cell.what.measure(lab, cell.seed)
        results.put(cell, {"seconds": round(time.process_time() - began, 2)} | found)
    drafts = [load_draft(str(folder), dtype="float32") for _, _, folder in trained]
    tables: list[dict[str, Any]] = [{} for _ in trained]
    for name in dict.fromkeys(each for _, recipe, _ in trained for each in ("test", "dev", *recipe.also_on)):
        chosen = [place for place, (_, recipe, _) in enumerate(trained) if name in ("test", "dev", *recipe.also_on)]
        for place, table in zip(chosen, scores(lab, [drafts[each] for each in chosen], name), strict=True):
            tables[place][name] = table
    for (cell, recipe, folder), draft, table in zip(trained, drafts, tables, strict=True):
        result: dict[str, Any] = {"kind": recipe.kind, "steps": 0, "seconds": 0.0}
        if recipe.epochs:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            result |= {name: facts[name] for name in ("steps", "rows", "seconds")}
        result |= {"scores": table, "relative_size": draft.num_parameters() / lab.target.num_parameters()}
        if recipe.keep_at:
            result["states"] = _states(lab, folder)
        results.put(cell, result)
    return done


def _states(lab: Lab, folder: Path) -> list[dict[str, Any]]:
    """What a draft was like on its way."""
    steps = sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))
    drafts = [load_draft(str(folder / f"step_{step}"), dtype="float32") for step in steps]
    return [
        {"step": step, "own_loss": own_loss(lab, draft), "scores": {"test": table}}
        for step, draft, table in zip(steps, drafts, scores(lab, drafts, "test"), strict=True)
    ]


def main(claims: Sequence[Claim], argv: Sequence[str] | None = None) -> None:
    """Run what is left of the claims, or list it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog=Path(sys.argv[0]).name
    )
    parser.add_argument("--work_dir", type=Path, default=Path("claims_work"), help="texts and drafts; may be removed")
    parser.add_argument("--results_dir", type=Path, default=HERE / "results")
    parser.add_argument("--pair", type=Path, default=DEMO, help="folder of the pair; the bundled one by default")
    parser.add_argument("--data_dir", type=Path, help="public prompts (GSM8K, BFCL, Chinese), which claim A1 needs")
    parser.add_argument("--mask_token", help="of parallel drafts, where the vocabulary has none in reserve")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lower_rates", **LOWER_RATES)
    parser.add_argument("--only", nargs="+", metavar="CLAIM", help="these claims, as A3")
    parser.add_argument("--list", action="store_true", help="only say what is done, and what is left")
    parser.add_argument("--budget_seconds", type=float, help="start no further cells after this time")
    parser.add_argument("--sizes", choices=SIZES, default="full", help="how much; smoke needs a --results_dir")
    options = parser.parse_args(argv)
    if options.sizes == "smoke" and options.results_dir == HERE / "results":
        parser.error("--sizes smoke would put toy results among the real ones: give a --results_dir.")
    if unknown := set(options.only or ()) - {claim.name for claim in claims}:
        parser.error(f"no claim is called {unknown.pop()!r}; there are: {', '.join(claim.name for claim in claims)}")
    chosen = [claim for claim in claims if not options.only or claim.name in options.only]
    _quiet()
    lab = Lab(options.pair, options.work_dir, SIZES[options.sizes], options.data_dir, options.mask_token)
    if options.mask_token not in (None, *lab.tokenizer.get_vocab()):
        parser.error(f"the target's vocabulary has no token {options.mask_token!r}")
    results = Results(options.results_dir, lab.weights, lab.sizes, tuple(options.lower_rates))
    if options.list:
        print(listing(chosen, results, options.seeds, lab.data_dir is not None))
        return
    began = time.monotonic()
    deadline = began + (math.inf if options.budget_seconds is None else options.budget_seconds)
    while time.monotonic() <= deadline:
        left = [
            cell
            for cell in cells(chosen, results, options.seeds, lab.data_dir is not None)
            if results.get(cell) is None
        ]
        if not left:
            break
        done = run_cells(lab, left[:SCORED_TOGETHER], results, deadline)
        names = ", ".join(cell.name for cell in done)
        print(f"{time.monotonic() - began:.0f} s: {names}; {len(left) - len(done)} left", flush=True)
    print(listing(chosen, results, options.seeds, lab.data_dir is not None))


def listing(claims: Sequence[Claim], results: Results, seeds: int, has_data: bool) -> str:
    """Cells done and left, by claim; seeds whose rate is not chosen yet are not counted."""
    lines = [f"pair {results.folder.name}"]
    for claim in claims:
        wanted = list(cells([claim], results, seeds, has_data))
        left = [cell for cell in wanted if results.get(cell) is None]
        seconds = sum(predicted_seconds(cell, results) for cell in left)
        lines.append(f"{claim.name}: {len(wanted) - len(left)} cells done, {len(left)} left, about {seconds:.0f} s")
        lines += [f"  {cell.name}" for cell in left]
    return "\n".join(lines)


def _commit() -> str | None:
    """The commit of this checkout, None outside of one."""
    command = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _quiet() -> None:
    import datasets
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
