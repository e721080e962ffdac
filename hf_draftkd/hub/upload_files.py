"""What of a folder may be published: an allow-list, and only where report, provenance and weights fit together.

Optimizer states, pickles, checkpoints, logs and adapters stay at home because they are not on the list. What is on it
and holds an access token is refused, and paths of this machine are taken out.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub.utils import filter_repo_objects
from transformers import GenerationConfig

from hf_draftkd import __version__
from hf_draftkd.data.shards import shard_path
from hf_draftkd.evaluation.recommendation import PARALLEL
from hf_draftkd.evaluation.report import Recommendation, SpeculationReport
from hf_draftkd.hub.access import redacted
from hf_draftkd.hub.provenance import Provenance, TrainingSummary, tuned_length
from hf_draftkd.models.draft_length import derived_generation_config, draft_length_settings, recorded_parallel_length
from hf_draftkd.models.identity import stored_parameters, weight_files, weights_checksum
from hf_draftkd.models.resolve import TOKENIZER_FILES, Checkpoint, resolve

REPORT_FILE = "report.json"
PLOT_FOLDER = "plots"
CUSTOM_GENERATE_FOLDER = "custom_generate"
_MAX_PLOT_BYTES = 5 * 2**20
_PNG = b"\x89PNG\r\n\x1a\n"
# Beside the weights.
_PUBLISHED = [
    "config.json",
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    *(f"{name}{suffix}" for name in ("LICEN[CS]E", "licen[cs]e", "NOTICE", "notice") for suffix in ("", ".md", ".txt")),
]
_TEXT_SUFFIXES = {".json", ".jinja", ".md", ".txt", ""}


@dataclass(frozen=True)
class PlannedFile:
    """One file of an upload: its path in the repository, the file on disk or bytes made for the upload, and why they
    differ from what lies on disk, if they do.
    """

    path: str
    source: Path | bytes
    remark: str = ""

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True)
class DraftFolder:
    """A folder that was found fit to be published, and what is known about it.

    `provenance` is empty where there is no file of it; plots may lie in the `pictures` folders; `contradictions` says
    where all this does not fit together, one sentence each, and `remarks` what a person should know besides.
    """

    checkpoint: Checkpoint
    parameters: int
    weights_sha256: str
    provenance: Provenance
    report: SpeculationReport | None
    pictures: tuple[Path, ...]
    contradictions: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return Path(self.checkpoint.name)


def look_at_folder(folder: str | Path, report: str | Path | SpeculationReport | None = None) -> DraftFolder:
    """Check a draft's folder and read what describes it; nothing is loaded and nothing is asked of the Hub.

    `report` is the report or its file. Without it, one is looked for in the folder, and then beside it, where the
    quickstart puts it. A report beside the folder may be a neighbour's: it is left out if it does not fit. Of the
    pictures beside a report only those in `plots` count: the others may be anybody's.
    """
    checkpoint = _check_folder(folder)
    path = Path(checkpoint.name)
    parameters, checksum = stored_parameters(path), weights_checksum(path)
    provenance = Provenance.load(path) or Provenance()
    contradictions = []
    if provenance.weights_sha256 not in (None, checksum):
        contradictions.append(_changed("provenance.json was written", provenance.weights_sha256, checksum))
    pictures, remarks = [path, path / PLOT_FOLDER], []
    beside = path.resolve().parent / REPORT_FILE
    was_named = report is not None or (path / REPORT_FILE).is_file()
    if report is None and (was_named or beside.is_file()):
        report = path / REPORT_FILE if was_named else beside
    if report is not None and not isinstance(report, SpeculationReport):
        pictures.append(Path(report).resolve().parent / PLOT_FOLDER)
        report = SpeculationReport.load(report)
    if report is not None:
        unfit = _contradictions(report, path, parameters, provenance.training)
        if unfit and not was_named:
            remarks.append(f"{REPORT_FILE} beside the folder is left out. {' '.join(unfit)}")
            report, pictures = None, pictures[:2]
        else:
            contradictions += unfit
    return DraftFolder(
        checkpoint, parameters, checksum, provenance, report, tuple(pictures), tuple(contradictions), tuple(remarks)
    )


def _check_folder(folder: str | Path) -> Checkpoint:
    """Make sure that a folder holds a whole draft: config, dense safetensors, tokenizer."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}. Give the one a draft was saved to.")
    checkpoint = resolve(path)
    if checkpoint.is_adapter:
        raise ValueError(
            f"{str(folder)!r} holds an adapter that is not merged; whoever downloads it could not pass it as "
            "`assistant_model`. Merge it: `model.merge_and_unload().save_pretrained(folder)`, or publish the "
            "`--output_dir` of `draftkd train`, which is merged, and not one of its checkpoints."
        )
    config = checkpoint.config  # says what is missing, before anything else is asked of it
    if checkpoint.is_multimodal:
        raise ValueError(
            f"{str(folder)!r} holds a multimodal model, which cannot be passed as `assistant_model`. Publish its text "
            f"model: `draftkd init --text_of {folder} --output_dir DIRECTORY`."
        )
    if getattr(config, "auto_map", None):
        raise ValueError(
            f"The config of {str(folder)!r} names custom code (`auto_map`). Code is not published with a draft, and "
            "without it nobody could load this one. Use an architecture that transformers has."
        )
    checkpoint.tokenizer  # noqa: B018 - raises where there is none
    return checkpoint


def _contradictions(
    report: SpeculationReport, folder: Path, parameters: int, training: TrainingSummary | None
) -> list[str]:
    """Where a report is about other weights, another target or another revision than the draft in a folder."""
    found = []
    draft, target = report.draft, report.target
    if draft.weights_sha256 is not None:
        # In the number format it was measured in: loading float32 weights as bfloat16 does not make them another draft.
        now = weights_checksum(folder, draft.dtype)
        if draft.weights_sha256 != now:
            found.append(_changed("the report's draft was measured", draft.weights_sha256, now))
    # Padded rows and tied heads make small differences between what a model counts and what a file holds.
    elif abs(draft.num_parameters - parameters) > 0.01 * parameters:
        found.append(
            f"The report is about a draft of {draft.num_parameters:,} parameters, the folder holds {parameters:,}."
        )
    if training is not None:
        names, revisions = (training.target, target.name), (training.target_revision, target.revision)
        for what, (trained, measured) in {"target": names, "target revision": revisions}.items():
            same_folder = os.path.isdir(str(trained)) and os.path.isdir(str(measured))
            same_folder = same_folder and os.path.samefile(str(trained), str(measured))  # one has many paths
            if trained and measured and trained != measured and not same_folder:
                found.append(f"The draft was trained for the {what} {trained!r}, the report is about {measured!r}.")
    return found


def _changed(since: str, expected: str | None, checksum: str) -> str:
    return f"The weights are not those from when {since}: sha256 {str(expected)[:12]}… then, {checksum[:12]}… now."


def model_files(folder: Path) -> list[PlannedFile]:
    """Config, tokenizer, licence and weights: what is published as it lies in the folder."""
    held = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
    names = sorted(path.relative_to(folder).as_posix() for path in held if path.is_file())
    files = [_cleaned(name, folder / name) for name in filter_repo_objects(names, allow_patterns=_PUBLISHED)]
    return files + [PlannedFile(path.name, path) for path in weight_files(folder)]


def _cleaned(name: str, path: Path) -> PlannedFile:
    """The file itself, or its JSON without the path that it was once loaded from."""
    if name in ("config.json", "tokenizer_config.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in data.items() if not key.endswith("name_or_path")}
        if kept != data:
            return PlannedFile(name, _json_bytes(kept), "without the path it was loaded from")
    return PlannedFile(name, path)


def custom_generate_files() -> list[PlannedFile]:
    """The code that `generate(custom_generate="org/draft", trust_remote_code=True)` runs, and what it needs."""
    code = package_files("hf_draftkd.hub").joinpath("custom_generate", "generate.py").read_bytes()
    requirements = f"hf_draftkd>={__version__}\n".encode()
    return [
        PlannedFile(f"{CUSTOM_GENERATE_FOLDER}/generate.py", code, "run only with `trust_remote_code=True`"),
        PlannedFile(f"{CUSTOM_GENERATE_FOLDER}/requirements.txt", requirements),
    ]


def generation_config_file(folder: Path, advice: Recommendation | None) -> PlannedFile | None:
    """`generation_config.json` with the draft length that a report recommends; one set by hand is left alone."""
    path = folder / "generation_config.json"
    is_held = path.is_file()
    held = json.loads(path.read_text(encoding="utf-8")) if is_held else derived_generation_config(folder).to_diff_dict()
    config, parallel = GenerationConfig.from_dict(held), advice is not None and advice.way == PARALLEL
    by_hand = recorded_parallel_length(config) if parallel else tuned_length(config)
    if advice is None or by_hand is not None:
        return PlannedFile(path.name, path) if is_held else None
    tuned = held | draft_length_settings(advice.num_assistant_tokens, parallel=parallel)
    tuned.pop("_from_model_config", None)  # transformers would drop keys that it does not know
    return PlannedFile(path.name, _json_bytes(tuned), f"with the report's draft length {advice.num_assistant_tokens}")


def plot_files(folders: Iterable[Path]) -> list[PlannedFile]:
    """The PNG files in some folders; other formats can hold scripts."""
    found: dict[str, Path] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.png"))):
        with path.open("rb") as file:
            is_png = file.read(len(_PNG)) == _PNG
        if is_png and path.stat().st_size <= _MAX_PLOT_BYTES:
            found.setdefault(path.name, path)
    return [PlannedFile(f"{PLOT_FOLDER}/{name}", path) for name, path in found.items()]


def shard_files(folder: Path, count: int, public: str, scratch: Path) -> list[PlannedFile]:
    """The shards of finished alignment data, with the `public` name of the target in their rows.

    Where rows name it otherwise, and a run that went on after the target was moved has several names for it, shards are
    written again into the `scratch` folder: its disk must hold them.
    """
    paths = [shard_path(folder, number, count) for number in range(count)]
    return [PlannedFile(f"data/{path.name}", _renamed(path, scratch / path.name, public)) for path in paths]


def _renamed(source: Path, destination: Path, name: str) -> Path:
    """A shard whose rows have this name for their target: the one that is there, or a copy."""
    with pq.ParquetFile(source) as file:
        if pc.all(pc.equal(file.read(["target"])["target"], name)).as_py():
            return source
        # The schema carries the features, by which `datasets` reads the columns as they were written.
        with pq.ParquetWriter(destination, file.schema_arrow, write_page_index=True) as writer:
            # One row group at a time: rows with cached distributions are large.
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number)
                position = rows.schema.get_field_index("target")
                field = rows.schema.field(position)
                names = pa.repeat(pa.scalar(name, field.type), rows.num_rows)
                writer.write_table(rows.set_column(position, field, names), row_group_size=rows.num_rows)
    return destination


def refuse_secrets(files: Iterable[PlannedFile], token: str | None) -> None:
    """Raise a `ValueError` for a text file that holds something that looks like an access token."""
    for file in files:
        is_text = Path(file.path).suffix in _TEXT_SUFFIXES
        content = file.read().decode("utf-8", errors="replace") if is_text else ""
        if redacted(content, token) != content:
            raise ValueError(
                f"{file.path} holds what looks like an access token. Remove it from the file, and revoke the token at "
                "huggingface.co/settings/tokens if it is real."
            )


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
