"""What goes into a draft's repository, worked out from its folder: which report, which facts, whose words.

Pure of the Hub except for two questions, each with an answer for the case that it stays unanswered: what the target's
config says, and under which licence the base model is.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from hf_draftkd.evaluation.report import ModelInfo, SpeculationReport
from hf_draftkd.hub import card_sections as sections
from hf_draftkd.hub.access import redacted
from hf_draftkd.hub.model_card import DraftModelCard
from hf_draftkd.hub.provenance import PairFacts, Provenance, TrainingSummary, read_json
from hf_draftkd.hub.public_names import without_paths
from hf_draftkd.hub.repositories import MAX_CARD_BYTES
from hf_draftkd.hub.upload_files import CARD_FILE, PLOT_FOLDER, REPORT_FILE, PlannedFile, check_folder
from hf_draftkd.models.identity import count_parameters, weights_checksum
from hf_draftkd.models.resolve import is_hub_id
from hf_draftkd.models.tokenizers import tokenizer_fingerprint
from hf_draftkd.utils.text import one_line


@dataclasses.dataclass(frozen=True)
class DraftFolder:
    """A folder that was found fit to be published, and what is known about it.

    Args:
        path: The folder.
        parameters: Parameters stored in it.
        provenance: Its `provenance.json`, empty where there is none.
        report: Its report, if any, and `report_folder`: where the plots of that lie, if they lie elsewhere.
        contradictions: Where these do not fit together, one sentence each.
        remarks: What a person should know besides.
    """

    path: Path
    parameters: int
    provenance: Provenance
    report: SpeculationReport | None
    report_folder: Path
    contradictions: list[str]
    remarks: tuple[str, ...] = ()


def look_at_folder(folder: str | Path, report: str | Path | SpeculationReport | None = None) -> DraftFolder:
    """Check a draft's folder and read what describes it; nothing is loaded and nothing is asked of the Hub.

    Args:
        folder: The draft's folder.
        report: The report or its file; None looks for `report.json`.

    Raises:
        ValueError: It holds no draft that could be published, or the report is none.
    """
    path = check_folder(folder)
    parameters = count_parameters(path)
    provenance = Provenance.load(path) or Provenance()
    found, report_folder = find_report(path, report)
    contradictions = mismatches(path, parameters, found, provenance)
    remarks = []
    if contradictions and report is None and report_folder != path:
        # Nobody said that the report beside the folder is this draft's: it may be its neighbour's.
        without = mismatches(path, parameters, None, provenance)
        if without != contradictions:
            remarks = [f"{REPORT_FILE} beside the folder is left out. {' '.join(contradictions)}"]
            found, report_folder, contradictions = None, path, without
    return DraftFolder(path, parameters, provenance, found, report_folder, contradictions, tuple(remarks))


def find_report(folder: Path, given: str | Path | SpeculationReport | None) -> tuple[SpeculationReport | None, Path]:
    """The report and the folder that its plots may lie in.

    Args:
        folder: The draft's folder; `report.json` is looked for there and beside it (where the quickstart puts it). What
            lies beside the folder nobody named: of its pictures, those in `plots` count.
        given: The report, or its file, where the user named one.

    Raises:
        ValueError: The file named does not exist, or is no report.
    """
    if isinstance(given, SpeculationReport):
        return given, folder
    if given is not None and not Path(given).is_file():
        raise ValueError(f"There is no report at {str(given)!r}. `draftkd evaluate` writes `report.json`.")
    candidates = [Path(given)] if given else [folder / REPORT_FILE, folder.resolve().parent / REPORT_FILE]
    for path in candidates:
        if path.is_file():
            beside = path.resolve().parent if given else path.resolve().parent / PLOT_FOLDER
            found = SpeculationReport.from_dict(read_json(path), str(path))
            return found, folder if path.parent == folder else beside
    return None, folder


def mismatches(folder: Path, parameters: int, report: SpeculationReport | None, provenance: Provenance) -> list[str]:
    """Where weights, report and provenance contradict each other, one sentence each."""
    found = []
    if provenance.weights_sha256 is not None:
        found += _changed("provenance.json was written", provenance.weights_sha256, weights_checksum(folder))
    if report is None:
        return found
    draft = report.draft
    if draft.weights_sha256 is not None:
        # In the number format it was measured in: loading float32 weights as bfloat16 does not make them another draft.
        now = weights_checksum(folder, draft.dtype)
        found += _changed("the report's draft was measured", draft.weights_sha256, now)
    else:
        found += _unlike(draft, folder, parameters)
    training = provenance.training
    if training is not None:
        for what, trained, measured in (
            ("target", training.target, report.target.name),
            ("target revision", training.target_revision, report.target.revision),
        ):
            if trained and measured and not _is_same(trained, measured):
                found.append(f"The draft was trained for the {what} {trained!r}, the report is about {measured!r}.")
    return found


def _changed(since: str, expected: str, checksum: str) -> list[str]:
    if checksum == expected:
        return []
    return [f"The weights are not those from when {since}: sha256 {expected[:12]}… then, {checksum[:12]}… now."]


def _unlike(draft: ModelInfo, folder: Path, parameters: int) -> list[str]:
    """What tells that a report without a checksum is about another draft: its size, or where the draft lay."""
    found = []
    # Padded rows and tied heads make small differences between what a model counts and what a file holds.
    if abs(draft.num_parameters - parameters) > 0.01 * parameters:
        found.append(
            f"The report is about a draft of {draft.num_parameters:,} parameters, the folder holds {parameters:,}."
        )
    other = Path(draft.name).expanduser()
    if other.is_dir() and not other.samefile(folder) and not _holds_same_weights(other, folder):
        found.append(f"The report is about the draft in {draft.name!r}, whose weights are others.")
    return found


def _holds_same_weights(one: Path, other: Path) -> bool:
    """A copy of the same draft is fine; a folder without weights is not the one that was measured."""
    try:
        return weights_checksum(one) == weights_checksum(other)
    except ValueError:
        return False


def _is_same(one: str, other: str) -> bool:
    """Whether two names of a target mean the same; one folder has many paths."""
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other))


def pair_facts(draft: DraftFolder, generation: PlannedFile | None, token: str | None) -> PairFacts:
    """What can be found out about the pair now, on top of what was stored when the draft was made."""
    report, stored = draft.report, draft.provenance.pair or PairFacts()
    tokenizer = AutoTokenizer.from_pretrained(draft.path, trust_remote_code=False)
    facts = {
        "draft_parameters": draft.parameters,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "has_chat_template": tokenizer.chat_template is not None,
    }
    held = GenerationConfig.from_dict(json.loads(generation.read())) if generation else None
    config = AutoConfig.from_pretrained(draft.path, trust_remote_code=False)
    training = draft.provenance.training or TrainingSummary()
    name = report.target.name if report else training.target
    is_local = report.target.is_local if report else training.target_is_local
    revision = report.target.revision if report else training.target_revision
    target = None
    # A folder that does not lie here must not be looked for on the Hub: a stranger's repository may have its name.
    if name is not None and (os.path.isdir(name) or not is_local):
        try:
            target = AutoConfig.from_pretrained(
                name, revision=revision if is_hub_id(name) else None, token=token, trust_remote_code=False
            )
        except (OSError, ValueError, HTTPError):
            target = None  # Not reachable from here: what was stored about it stands.
    now = PairFacts.from_configs(config, target or config, draft_generation_config=held, **facts)
    if target is None:
        now = dataclasses.replace(
            now, target_vocab_size=stored.target_vocab_size, same_special_ids=stored.same_special_ids
        )
    size = report.target.num_parameters if report else stored.target_parameters
    return dataclasses.replace(now, target_parameters=size)


def public_provenance(draft: DraftFolder, pair: PairFacts) -> Provenance:
    """The provenance as strangers may read it: no paths of this machine, no tokens, and what does not fit is said."""
    provenance = draft.provenance
    training = provenance.training
    if training is not None:
        names: dict[str, Any] = {which: training.public_name(which) for which in ("target", "draft", "dataset")}
        training = dataclasses.replace(training, **names)
    notes = [*(provenance.notes or ()), *(f"Published although: {words}" for words in draft.contradictions)]
    return dataclasses.replace(
        provenance,
        command=redacted(without_paths(provenance.command)) if provenance.command else None,
        weights_sha256=weights_checksum(draft.path),
        training=training,
        pair=pair,
        notes=list(dict.fromkeys(map(without_paths, notes))) or None,
    )


def local_card(folder: Path) -> DraftModelCard | None:
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_CARD_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; that is no model card.")
    return read_card(path.read_text(encoding="utf-8-sig"), str(path))


def read_card(text: str, where: str) -> DraftModelCard:
    """A card that somebody may have edited; figures in its metadata that are no figures are dropped.

    Raises:
        ValueError: Its metadata is no YAML, or no mapping.
    """
    try:
        return DraftModelCard(text, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"The metadata of {where} cannot be read ({problem}). Correct it first.") from None


def merged_card(
    fresh: DraftModelCard, local: DraftModelCard | None, remote: DraftModelCard | None, prose: str | None
) -> tuple[DraftModelCard, str]:
    """The fresh figures in the words that a person wrote, wherever those are.

    On the Hub a card's title is the repository's name, so another one was chosen by a person. In the folder it is the
    folder's name or the run's, and says nothing.
    """
    default = sections.prose_of(fresh.text)
    remote_edited = remote is not None and sections.prose_of(remote.text) != default
    local_edited = local is not None and _without_title(sections.prose_of(local.text)) != _without_title(default)
    if local_edited and remote_edited:
        assert local is not None
        assert remote is not None
        if prose is None and sections.prose_of(local.text) != sections.prose_of(remote.text):
            raise ValueError(
                "The card was edited on the Hub, and README.md in the folder was edited too, differently. Say whose "
                "words to keep with `prose='hub'` or `prose='local'` (`--prose` on the command line)."
            )
    if remote is not None and (prose == "hub" or (prose is None and remote_edited)):
        return remote.updated_from(fresh), "figures updated, the words on the Hub kept"
    if local is not None and (prose == "local" or local_edited):
        return local.updated_from(fresh), "with the words of the README.md in the folder"
    # Nobody wrote anything: metadata set by hand on the Hub is kept nevertheless.
    base = remote or local
    if base is None:
        return fresh, ""
    untouched = type(base)(fresh.render())
    untouched.data = base.updated_from(fresh).data
    return untouched, "figures updated" if remote else ""


def _without_title(prose: str) -> str:
    return "\n".join(line for line in prose.splitlines() if not line.startswith("# "))


def inherited_license(api: HfApi, base_model: Any, token: str | None) -> dict[str, str]:
    """The base model's licence as metadata: `license`, and which it is where that is "other".

    Raises:
        ValueError: It cannot be found out, so a person has to say one.
    """
    reason = "the draft does not start from a model on the Hub that it could inherit one from"
    if isinstance(base_model, str):
        try:
            data = api.model_info(base_model, expand=["cardData"]).card_data
            if data is not None and isinstance(data.get("license"), str):
                named = {key: data.get(key) for key in ("license", "license_name", "license_link")}
                if not str(named["license_link"]).startswith("https://"):  # a file of the base's own repository
                    del named["license_link"]
                return {key: one_line(value) for key, value in named.items() if isinstance(value, str)}
            reason = f"the card of {base_model} names none"
        except TypeError:
            # huggingface_hub passes metadata of others to a constructor, which cannot take all of it.
            reason = f"the metadata of {base_model} cannot be read"
        except (HTTPError, ConnectionError) as error:
            said = redacted(error, token).splitlines()[0]
            reason = f"the model {base_model} could not be asked ({type(error).__name__}: {said})"
    raise ValueError(f"Which licence? {reason[0].upper()}{reason[1:]}. Pass `license`, for instance 'apache-2.0'.")
