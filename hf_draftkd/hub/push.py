"""Publish a draft: one commit with everything that makes it usable, and nothing else.

    push_draft("quickstart/draft", "me/my-draft", license="apache-2.0", dry_run=True)    # what would be uploaded
    push_draft("quickstart/draft", "me/my-draft", license="apache-2.0")

The order is: look at the folder, look at the Hub, plan, show or commit. Nothing is written before the plan stands, and
nothing on disk is touched: after any failure the same call finishes the job.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, eval_result_entries_to_yaml, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, GenerationConfig

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub import upload_files
from hf_draftkd.hub.access import redacted, writing_token
from hf_draftkd.hub.card_merge import CARD_FILE, Place, merged, read_card
from hf_draftkd.hub.metadata import benchmark_entries
from hf_draftkd.hub.model_card import DraftModelCard, local_model_card
from hf_draftkd.hub.provenance import PROVENANCE_FILE, PairFacts, TrainingSummary
from hf_draftkd.hub.public_names import public_report
from hf_draftkd.hub.repository import Repository
from hf_draftkd.hub.upload_files import CUSTOM_GENERATE_FOLDER, PLOT_FOLDER, REPORT_FILE, DraftFolder, PlannedFile
from hf_draftkd.models.resolve import is_hub_id
from hf_draftkd.utils.text import one_line

_VISIBILITY = {True: "private", False: "public", None: "new, public or private as its owner's default says"}
_BENCHMARK_FILE = ".eval_results/draftkd.yaml"
# What of an older version must not stay beside the new: transformers prefers a single weight file over shards, and
# metrics of other weights would mislead.
_STALE = [
    REPORT_FILE,
    _BENCHMARK_FILE,
    f"{PLOT_FOLDER}/*",
    f"{CUSTOM_GENERATE_FOLDER}/*",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    # An adapter that was there before: transformers would load it, with its base, and not these weights.
    "adapter_config.json",
    "adapter_model.*",
]
_AGAIN = "Nothing was published, nothing on disk has changed: the same command tries again."
_WORDS_OF = {"hub": "the card on the Hub", "local": f"the {CARD_FILE} in the folder"}


@dataclass(frozen=True)
class Upload:
    """What is, or was, published: files, the model card among them, and in the same commit paths that are deleted.

    `private` is None before a new repository is made by its owner's default. `commit` and `url` are None in a dry run.
    """

    repo_id: str
    files: tuple[PlannedFile, ...]
    deleted: tuple[str, ...]
    card: DraftModelCard
    remarks: tuple[str, ...]
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit: str | None = None
    url: str | None = None

    def __str__(self) -> str:
        width = max(len(file.path) for file in self.files)
        where = f" (revision {self.revision})" if self.revision else ""
        kind = "pull request on" if self.create_pr else "commit to"
        lines = [f"{kind} {self.repo_id}{where}, {_VISIBILITY[self.private]}:"]
        files = (f"{file.path:<{width}}  {file.size:>13,} bytes  {file.remark}" for file in self.files)
        lines += [f"  {line.rstrip()}" for line in files]
        lines += [f"  {path:<{width}}  deleted: belongs to an older version" for path in self.deleted]
        lines += [f"note: {remark}" for remark in self.remarks]
        return "\n".join(lines)


def push_draft(
    folder: str | Path,
    repo_id: str,
    *,
    report: str | Path | SpeculationReport | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Iterable[str] = (),
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload draft model",
    benchmark_task: str | None = None,
    prose: Place | None = None,
    custom_generate: bool = False,
    allow_mismatch: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Upload:
    """Publish a draft's folder on the Hub.

    Args:
        folder: What `trainer.save_model()` or `draftkd train` wrote.
        repo_id: `user/name`, or `name` for the user who is logged in.
        report: The report, or its file. By default `report.json` in the folder or beside it; a draft without one is
            published with a card that says that nothing was measured.
        license: Identifier; by default that of the card in the folder or on the Hub, else that of the base model.
        language: Language code or codes for the metadata.
        tags: Further tags.
        private: Whether a new repository is private; None leaves it to the organisation's default. An existing one
            keeps its visibility; True refuses one that is public.
        revision: Branch to commit to, made where it does not exist; or a pull request (`refs/pr/3`).
        create_pr: Open a pull request instead of committing.
        commit_message: First line of the commit.
        benchmark_task: Also write a leaderboard result (`.eval_results/`) for this task of the benchmark that the
            report's prompts come from.
        prose: Whose words win where card and folder were both edited: "hub" or "local".
        custom_generate: Also publish a few lines of code with which `generate(..., assistant_model=draft,
            custom_generate=repo_id, trust_remote_code=True)` decodes with [`SpeculativeDecoding`]. Code of an earlier
            version is deleted where this is off.
        allow_mismatch: Publish although report, provenance and weights do not fit together; the card says so.
        dry_run: Return the plan and write nothing. Works without a login.
        token: Access token; by default the one that is logged in.

    Returns:
        What was, or would be, published; `print` shows it.

    Raises:
        ValueError: The folder, report, name, licence or login is not in order, or what should be private would be
            public; says what to do.
        ConnectionError: The Hub or the network failed; nothing was published.
    """
    validate_repo_id(repo_id)
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request is opened against main; leave out revision={revision!r} or `create_pr`.")
    if not commit_message.strip():
        raise ValueError("`commit_message` is empty. Give the commit a first line, or leave it out.")
    draft = upload_files.look_at_folder(folder, report)
    if draft.contradictions and not allow_mismatch:
        raise ValueError(
            f"Report, provenance and weights do not belong together. {' '.join(draft.contradictions)} Evaluate this "
            "draft again (`draftkd evaluate`), or pass `allow_mismatch` and the card will say so."
        )
    token = token or get_token() if dry_run else writing_token(token)
    api = HfApi(token=token)
    remarks = list(draft.remarks)
    try:
        there = Repository.look(api, repo_id, private=private, afterwards=_AGAIN, revision=revision)
    except ConnectionError as error:
        if not dry_run:
            raise
        there = Repository(api, repo_id, _AGAIN)
        remarks.append(f"{error} The card is shown as for a new repository.")
    holds_weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in there.files)
    if holds_weights and "draft-model" not in there.tags and not allow_mismatch:
        raise ValueError(
            f"{there.repo_id} exists and holds a model that is not a draft (its card lacks the tag `draft-model`). "
            "Name another repository, or pass `allow_mismatch` to overwrite it."
        )
    wanted = {"license": license, "language": language, "tags": tags}
    card, files = _contents(draft, there, wanted, prose, benchmark_task, custom_generate)
    upload_files.refuse_secrets(files, token)
    if draft.report is None:
        remarks.append(f"There is no {REPORT_FILE} of this draft: the card says that nothing was measured.")
    plan = Upload(
        there.repo_id,
        tuple(files),
        deleted=there.stale(_STALE, files),
        card=card,
        remarks=tuple(remarks),
        private=private if there.private is None else there.private,
        revision=revision,
        create_pr=create_pr,
    )
    if dry_run:
        return plan
    _, is_private, done = there.commit(files, plan.deleted, commit_message, private=plan.private, create_pr=create_pr)
    return dataclasses.replace(plan, private=is_private, commit=done.oid, url=done.pr_url or done.commit_url)


def _contents(
    draft: DraftFolder,
    there: Repository,
    wanted: dict[str, Any],
    prose: Place | None,
    task: str | None,
    custom_generate: bool,
) -> tuple[DraftModelCard, list[PlannedFile]]:
    """The card, and all files of the upload."""
    report = public_report(draft.report) if draft.report else None
    generation = upload_files.generation_config_file(draft.path, report.recommendation if report else None)
    notes = [*(draft.provenance.notes or ()), *(f"Published although: {words}" for words in draft.contradictions)]
    provenance = dataclasses.replace(
        draft.provenance,
        weights_sha256=draft.weights_sha256,
        pair=_pair(draft, generation, there.api.token),
        notes=list(dict.fromkeys(notes)) or None,
    ).public()
    plots = upload_files.plot_files(draft.pictures)
    fresh = DraftModelCard.from_report(
        report,
        provenance=provenance,
        name=there.repo_id,
        **wanted,
        custom_generate=custom_generate,
        plots={Path(plot.path).stem.replace("_", " ").capitalize(): plot.path for plot in plots},
    )
    local = local_model_card(draft.path, fresh)
    held = read_card(DraftModelCard, there.card, f"the card of {there.repo_id}")
    given = {key: fresh.data[key] for key in ("license", "language") if wanted[key] is not None}
    # The fresh card in the words that a person wrote, wherever those are.
    card, place = merged(fresh, local, held, prose, given)
    settled = given
    if not (card.data.to_dict() | given).get("license"):
        settled = given | _inherited_license(there.api, fresh.data.get("base_model"))
    for key, value in settled.items():
        card.data[key] = value
    if not custom_generate and card.data.get("tags"):  # an earlier version may have had it
        card.data["tags"] = [tag for tag in card.data["tags"] if tag != CUSTOM_GENERATE_FOLDER]
    remark = f"with the words of {_WORDS_OF[place]}" if place else "updated" if held else ""
    files = [PlannedFile(CARD_FILE, card.render().encode(), remark)]
    if report:
        files.append(PlannedFile(REPORT_FILE, report.to_json().encode()))
    files.append(PlannedFile(PROVENANCE_FILE, provenance.to_json().encode()))
    files += [*upload_files.model_files(draft.path), *([generation] if generation else []), *plots]
    if custom_generate:
        files += upload_files.custom_generate_files()
    if task is not None:
        entries = eval_result_entries_to_yaml(benchmark_entries(report, task))
        files.append(PlannedFile(_BENCHMARK_FILE, yaml.safe_dump(entries, sort_keys=False).encode()))
    return card, files


def _pair(draft: DraftFolder, generation: PlannedFile | None, token: str | bool | None) -> PairFacts:
    """What can be found out about the pair now, on top of what was stored when the draft was made."""
    stored, training = draft.provenance.pair or PairFacts(), draft.provenance.training or TrainingSummary()
    name, is_local, revision = training.target, training.target_is_local, training.target_revision
    size = stored.target_parameters
    if draft.report:
        target = draft.report.target
        name, is_local, revision, size = target.name, target.is_local, target.revision, target.num_parameters
    config = draft.checkpoint.config
    target_config = None
    # A folder that does not lie here must not be looked for on the Hub: a stranger's repository may have its name.
    if name is not None and (os.path.isdir(name) or not is_local):
        with suppress(OSError, ValueError, HTTPError):  # not reachable from here: what was stored about it stands
            target_config = AutoConfig.from_pretrained(
                name, revision=revision if is_hub_id(name) else None, token=token, trust_remote_code=False
            )
    facts = PairFacts.from_configs(
        config,
        target_config or config,
        draft.checkpoint.tokenizer,
        draft_generation_config=GenerationConfig.from_dict(json.loads(generation.read())) if generation else None,
        draft_parameters=draft.parameters,
        target_parameters=size,
    )
    known = {} if target_config else {key: getattr(stored, key) for key in ("target_vocab_size", "same_special_ids")}
    return dataclasses.replace(facts, **known)


def _inherited_license(api: HfApi, base_model: Any) -> dict[str, str]:
    """The base model's licence as metadata: `license`, and which it is where that is "other"; else a `ValueError`."""
    reason = "the draft does not start from a model on the Hub that it could inherit one from"
    if isinstance(base_model, str):
        try:
            data: Any = api.model_info(base_model, expand=["cardData"]).card_data or {}
            named = {key: data.get(key) for key in ("license", "license_name", "license_link")}
            if not str(named["license_link"]).startswith("https://"):  # a file of the base's own repository
                del named["license_link"]
            if isinstance(named["license"], str):
                return {key: one_line(value) for key, value in named.items() if isinstance(value, str)}
            reason = f"the card of {base_model} names none"
        except TypeError:
            # huggingface_hub passes metadata of others to a constructor, which cannot take all of it.
            reason = f"the metadata of {base_model} cannot be read"
        except (HTTPError, ConnectionError) as error:
            said = redacted(error, api.token).splitlines()[0]
            reason = f"the model {base_model} could not be asked ({type(error).__name__}: {said})"
    raise ValueError(
        f"Which licence? {reason[0].upper()}{reason[1:]}. Pass `license` (`--license`), for instance 'apache-2.0'."
    )
