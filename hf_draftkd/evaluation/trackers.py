"""A report in an experiment tracker, beside the training of its draft."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hf_draftkd.evaluation.recommendation import WAYS, measured_run
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.evaluation.tables import report_cells
from hf_draftkd.utils.checks import one_of

# What `report_to` may name here, and the module that must be there for it.
TRACKERS = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}

# How the measured speed-up by each of the `WAYS` is called.
_SPEEDUPS = ("speedup", "speedup_speculative_decoding", "speedup_speculative_decoding_in_parallel")


def tracker_modules(names: Sequence[str]) -> dict[str, Any]:
    """The modules of trackers, by name.

    Raises:
        ValueError: A name is not one of `TRACKERS`.
        ImportError: A tracker is not installed.
    """
    found = {}
    for name in names:
        try:
            found[name] = import_module(TRACKERS[one_of("`report_to`", name, TRACKERS)])
        except ImportError as error:
            raise ImportError(f"`report_to` names {name}, which is not installed: pip install {name}.") from error
    return found


def log_report(
    report: SpeculationReport,
    report_to: Sequence[str],
    *,
    project: str = "huggingface",
    run_name: str | None = None,
    logging_dir: str | Path = "runs",
) -> None:
    """Send a report's figures (`report/greedy/acceptance_rate`, ...) and its whole table (`report/table`) to trackers.

    Args:
        report: The report.
        report_to: Names of trackers: `trackio`, `wandb`, `tensorboard`.
        project: trackio and wandb: as in `TrainingArguments`.
        run_name: trackio: the run of that name goes on, such as the one in which the draft was trained. wandb: the run
            that is active in this process goes on; where none is, a new one gets this name.
        logging_dir: tensorboard: folder of its files.

    Raises:
        ValueError: A name is not a tracker's.
        ImportError: A tracker is not installed.
    """
    figures: dict[str, float] = {}
    for setting in report.settings:
        efficiency = (setting.block_efficiency or {}).get(report.num_assistant_tokens)
        named = {"acceptance_rate": setting.acceptance_rate, "block_efficiency": efficiency}
        runs = {key: measured_run(setting, way) for key, way in zip(_SPEEDUPS, WAYS, strict=True)}
        named |= {key: run.speedup for key, run in runs.items() if run}
        figures |= {f"report/{setting.words}/{key}": each.value for key, each in named.items() if each}
    (_, *names), *cells = report_cells(report)
    headings = ["setting", *names]
    rows = [[*row, *[""] * (len(headings) - len(row))] for row in cells]
    for name, module in tracker_modules(report_to).items():
        if name == "tensorboard":
            with module.SummaryWriter(str(logging_dir)) as writer:
                for key, value in figures.items():
                    writer.add_scalar(key, value)
                lines = [headings, ["---"] * len(headings), *rows]
                writer.add_text("report/table", "\n".join(f"| {' | '.join(line)} |" for line in lines))
            continue
        is_active = name == "wandb" and module.run is not None
        if not is_active:
            module.init(project=project, name=run_name, resume="allow")
        module.log(figures | {"report/table": module.Table(columns=headings, data=rows)})
        if not is_active:
            module.finish()
