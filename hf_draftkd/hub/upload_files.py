"""What of a folder may be published: an allow-list, and nothing that could harm its readers or its owner.

Optimizer states, pickles, checkpoints, logs and adapters stay at home because they are not on the list. What is on it
and holds an access token, or the path of a machine, is refused or cleaned.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from hf_draftkd.hub.access import holds_token
from hf_draftkd.hub.provenance import read_json
from hf_draftkd.models.draft_length import draft_length_settings
from hf_draftkd.models.identity import weight_files
from hf_draftkd.models.resolve import TOKENIZER_FILES, check_model

REPORT_FILE = "report.json"
CARD_FILE = "README.md"
PLOT_FOLDER = "plots"
MAX_PLOT_BYTES = 5 * 2**20
_PNG = b"\x89PNG\r\n\x1a\n"
_TOKENIZER_EXTRAS = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
_TEMPLATE_FOLDER = "additional_chat_templates"
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE)(\.(md|txt))?", re.IGNORECASE)
_TEXT_SUFFIXES = {".json", ".jinja", ".md", ".txt", ""}


@dataclass(frozen=True)
class PlannedFile:
    """One file of an upload.

    Args:
        path: Path in the repository.
        source: The file on disk, or the bytes themselves where they were made for the upload.
        remark: Why it differs from what lies on disk, if it does.
    """

    path: str
    source: Path | bytes
    remark: str = ""

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


def check_folder(folder: str | Path) -> Path:
    """Make sure that a folder holds a whole draft: config, dense safetensors, tokenizer.

    Raises:
        ValueError: It does not; the message says what is missing and how to get it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}. Give the one a draft was saved to.")
    names = {item.name for item in path.iterdir()}
    if "adapter_config.json" in names and "config.json" not in names:
        raise ValueError(
            f"{str(folder)!r} holds an adapter that is not merged; whoever downloads it could not pass it as "
            "`assistant_model`. Merge it: `model.merge_and_unload().save_pretrained(folder)`, or publish the "
            "`--output_dir` of `draftkd train`, which is merged, and not one of its checkpoints."
        )
    config = check_model(str(path))
    if getattr(config, "auto_map", None):
        raise ValueError(
            f"The config of {str(folder)!r} names code of its own (`auto_map`). Code is not published with a draft, "
            "and without it nobody could load this one. Use an architecture that transformers has."
        )
    if not names & set(TOKENIZER_FILES):
        raise ValueError(
            f"{str(folder)!r} has no tokenizer. Save the target's there: `tokenizer.save_pretrained(folder)`; engines "
            "compare it with the target's."
        )
    return path


def model_files(folder: Path) -> list[PlannedFile]:
    """Config, weights, tokenizer, licence: what is published as it lies in the folder."""
    wanted = ["config.json", *TOKENIZER_FILES, *_TOKENIZER_EXTRAS]
    found = [path for name in wanted if (path := folder / name).is_file()]
    found += weight_files(folder)
    found += sorted(path for path in folder.iterdir() if path.is_file() and _LICENCE.fullmatch(path.name))
    files = [_cleaned(path) for path in found]
    templates = folder / _TEMPLATE_FOLDER
    if templates.is_dir():
        files += [PlannedFile(f"{_TEMPLATE_FOLDER}/{path.name}", path) for path in sorted(templates.glob("*.jinja"))]
    return files


def _cleaned(path: Path) -> PlannedFile:
    """The file itself, or its JSON without the path it was once loaded from."""
    if path.name in ("config.json", "tokenizer_config.json"):
        data = read_json(path)
        if (
            isinstance(data, dict)
            and (kept := {k: v for k, v in data.items() if not k.endswith("name_or_path")}) != data
        ):
            return PlannedFile(path.name, json_bytes(kept), "without the path it was loaded from")
    return PlannedFile(path.name, path)


def generation_config_file(folder: Path, num_assistant_tokens: int | None) -> PlannedFile | None:
    """`generation_config.json` with the tuned draft length; a length that was set by hand is left alone.

    Args:
        folder: The draft's folder.
        num_assistant_tokens: The length that a report recommends, None where there is none.
    """
    path = folder / "generation_config.json"
    held = read_json(path) if path.is_file() else {}
    is_tuned = (
        held.get("num_assistant_tokens_schedule") == "constant"
        and held.get("assistant_confidence_threshold") == 0
        and "num_assistant_tokens" in held
    )
    if num_assistant_tokens is None or is_tuned:
        return PlannedFile(path.name, path) if path.is_file() else None
    tuned = draft_length_settings(num_assistant_tokens)
    # Made into a GenerationConfig once, so that a value transformers would refuse is refused here.
    GenerationConfig.from_dict(held | tuned).validate()
    return PlannedFile(path.name, json_bytes(held | tuned), f"with the report's draft length {num_assistant_tokens}")


def plot_files(*folders: Path) -> list[PlannedFile]:
    """The PNG files beside a report or in its `plots` folder; other formats can hold scripts."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted([*folder.glob("*.png"), *(folder / PLOT_FOLDER).glob("*.png")]):
            with path.open("rb") as file:
                is_png = file.read(len(_PNG)) == _PNG
            if is_png and path.stat().st_size <= MAX_PLOT_BYTES:
                found.setdefault(path.name, path)
    return [PlannedFile(f"{PLOT_FOLDER}/{name}", path) for name, path in found.items()]


def refuse_secrets(files: Iterable[PlannedFile], token: str | None) -> None:
    """Raises: ValueError: a text file holds something that looks like an access token."""
    for file in files:
        is_text = Path(file.path).suffix in _TEXT_SUFFIXES
        if is_text and holds_token(file.read().decode("utf-8", errors="replace"), token):
            raise ValueError(
                f"{file.path} holds what looks like an access token. Remove it from the file, and revoke the token at "
                "huggingface.co/settings/tokens if it is real."
            )


def json_bytes(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
