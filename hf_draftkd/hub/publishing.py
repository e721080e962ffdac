"""Publish a draft: one commit with everything that makes it usable, and nothing else.

    push_draft("quickstart/draft", "me/my-draft", license="apache-2.0", dry_run=True)    # what would be uploaded
    push_draft("quickstart/draft", "me/my-draft", license="apache-2.0")

The order is: look at the folder, look at the Hub, plan, show or commit. Nothing is written before the plan stands, the
commit is one, and nothing on disk is touched: after any failure the same call finishes the job.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub import contents, sections
from hf_draftkd.hub.access import hub_errors, redacted, without_home, writing_token
from hf_draftkd.hub.card import DraftModelCard, public_name, public_report
from hf_draftkd.hub.contents import CARD_FILE, REPORT_FILE, PlannedFile, json_bytes
from hf_draftkd.hub.figures import tuned_length
from hf_draftkd.hub.markdown import is_hub_id
from hf_draftkd.hub.summary import PROVENANCE_FILE, PairFacts, Provenance, TrainingSummary, read_json
from hf_draftkd.hub.weights import WEIGHT_FILE, count_parameters, weights_checksum
from hf_draftkd.models.tokenizers import tokenizer_fingerprint

MAX_CARD_BYTES = 2**20
_AGAIN = "Nothing was published, nothing on disk has changed: the same command tries again."


@dataclass(frozen=True)
class Upload:
    """What is, or was, published.

    Args:
        repo_id: The repository, with its owner.
        files: What goes in, in order.
        deleted: Paths of stale weights in the repository that go out in the same commit.
        card: The model card among `files`.
        remarks: What a person should know before (or after) it happens.
        private, revision, create_pr: As passed to `push_draft`.
        commit, url: The commit and where to see it; None in a dry run.
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
        lines = [f"{kind} {self.repo_id}{where}, {'private' if self.private else 'public or as it is'}:"]
        lines += [
            f"  {file.path:<{width}}  {file.size:>13,} bytes{f'  {file.remark}' if file.remark else ''}"
            for file in self.files
        ]
        lines += [f"  {path:<{width}}  deleted: weights of an older version" for path in self.deleted]
        lines += [f"note: {remark}" for remark in self.remarks]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Remote:
    """The repository as it is: its last commit, its files, its card."""

    sha: str | None = None
    files: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    card: str | None = None


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
    prose: Literal["hub", "local"] | None = None,
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
            keeps its visibility.
        revision: Branch to commit to; made where it does not exist.
        create_pr: Open a pull request instead of committing.
        commit_message: First line of the commit.
        prose: Whose words win where card and folder were both edited: "hub" or "local".
        allow_mismatch: Publish although report, provenance and weights do not fit together; the card says so.
        dry_run: Return the plan and write nothing. Works without a login.
        token: Access token; by default the one that is logged in.

    Returns:
        What was, or would be, published; `print` shows it.

    Raises:
        ValueError: The folder, report, name, licence or login is not in order; says what to do.
        ConnectionError: The Hub or the network failed; nothing was published.
    """
    if prose not in (None, "hub", "local"):
        raise ValueError(f"`prose` must be 'hub' or 'local', got {prose!r}.")
    _check_repo_id(repo_id)
    path = contents.check_folder(folder)
    parameters = count_parameters(path)
    provenance = Provenance.load(path) or Provenance()
    found, report_folder = _find_report(path, report)
    mismatches = _mismatches(path, parameters, found, provenance)
    if mismatches and not allow_mismatch:
        raise ValueError(
            "The report or the provenance belongs to something else: " + " ".join(mismatches) + " Evaluate this draft "
            "again (`draftkd evaluate`), or pass `allow_mismatch` and the card will say so."
        )
    token = token or get_token() if dry_run else writing_token(token)
    api = HfApi(token=token)
    repo_id = _with_owner(api, repo_id, dry_run=dry_run, token=token)
    remote, remarks = _look_at_hub(api, repo_id, revision, dry_run=dry_run, token=token)
    if remote.files and not allow_mismatch and _holds_another_model(remote):
        raise ValueError(
            f"{repo_id} exists and holds a model that is not a draft (its card lacks the tag `draft-model`). Name "
            "another repository, or pass `allow_mismatch` to overwrite it."
        )
    plan = _plan(
        path, repo_id, found, report_folder, provenance, parameters, remote, api,
        license=license, language=language, tags=tags, prose=prose, mismatches=mismatches, token=token,
    )  # fmt: skip
    plan = dataclasses.replace(
        plan, private=private, revision=revision, create_pr=create_pr, remarks=(*remarks, *plan.remarks)
    )
    contents.refuse_secrets(plan.files, token)
    return plan if dry_run else _commit(api, plan, remote, commit_message, token)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{error} A repository is named `user/name` or `organisation/name`.") from None


def _with_owner(api: HfApi, repo_id: str, *, dry_run: bool, token: str | None) -> str:
    if "/" in repo_id or (dry_run and token is None):
        return repo_id
    with hub_errors("asking who is logged in", afterwards=_AGAIN, token=token):
        return f"{api.whoami()['name']}/{repo_id}"


def _find_report(folder: Path, given: str | Path | SpeculationReport | None) -> tuple[SpeculationReport | None, Path]:
    """The report and the folder that its plots may lie in."""
    if isinstance(given, SpeculationReport):
        return given, folder
    if given is not None and not Path(given).is_file():
        raise ValueError(f"There is no report at {str(given)!r}. `draftkd evaluate` writes `report.json`.")
    candidates = [Path(given)] if given else [folder / REPORT_FILE, folder.resolve().parent / REPORT_FILE]
    for path in candidates:
        if path.is_file():
            return SpeculationReport.from_dict(read_json(path), str(path)), path.resolve().parent
    return None, folder


def _mismatches(folder: Path, parameters: int, report: SpeculationReport | None, provenance: Provenance) -> list[str]:
    """Where weights, report and provenance contradict each other, one sentence each."""
    found = []
    checksum = None
    recorded = [("provenance.json", provenance.weights_sha256)]
    if report is not None:
        recorded.append(("the report", getattr(report.draft, "weights_sha256", None)))
        # Padded rows and tied heads make small differences between what a model counts and what a file holds.
        if abs(report.draft.num_parameters - parameters) > 0.01 * parameters:
            found.append(
                f"The report is about a draft of {report.draft.num_parameters:,} parameters, the folder holds "
                f"{parameters:,}."
            )
    for name, expected in recorded:
        if expected is not None:
            checksum = checksum or weights_checksum(folder)
            if expected != checksum:
                found.append(
                    f"The weights have changed since {name} was written (sha256 {expected[:12]}… is now {checksum[:12]}…)."
                )
    training = provenance.training
    if report is not None and training is not None:
        for what, trained, measured in (
            ("target", training.target, report.target.name),
            ("target revision", training.target_revision, report.target.revision),
        ):
            if trained and measured and trained != measured:
                found.append(f"The draft was trained for the {what} {trained!r}, the report is about {measured!r}.")
    return found


def _look_at_hub(
    api: HfApi, repo_id: str, revision: str | None, *, dry_run: bool, token: str | None
) -> tuple[_Remote, list[str]]:
    try:
        with hub_errors(f"looking at {repo_id}", afterwards=_AGAIN, token=token):
            return _remote(api, repo_id, revision), []
    except ConnectionError as error:
        if not dry_run:
            raise
        return _Remote(), [f"{error} The card is shown as for a new repository."]


def _remote(api: HfApi, repo_id: str, revision: str | None) -> _Remote:
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        # The Hub answers 401 for a repository that does not exist to anybody whose token it does not know.
        if error.response.status_code == 401 and api.token:
            raise
        return _Remote()
    if revision and revision != "main":
        branches = {branch.name: branch for branch in api.list_repo_refs(repo_id).branches}
        info = api.model_info(repo_id, revision=revision if revision in branches else None)
    files = tuple(sibling.rfilename for sibling in info.siblings or ())
    text = None
    if CARD_FILE in files:
        [entry] = api.get_paths_info(repo_id, CARD_FILE, revision=info.sha)
        if entry.size > MAX_CARD_BYTES:
            raise ValueError(f"The card of {repo_id} has {entry.size:,} bytes; that is no card. Look at it on the Hub.")
        text = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=info.sha)).read_text(encoding="utf-8-sig")
    return _Remote(sha=info.sha, files=files, tags=tuple(info.tags or ()), card=text)


def _holds_another_model(remote: _Remote) -> bool:
    has_weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in remote.files)
    return has_weights and "draft-model" not in remote.tags


def _plan(
    folder: Path,
    repo_id: str,
    report: SpeculationReport | None,
    report_folder: Path,
    provenance: Provenance,
    parameters: int,
    remote: _Remote,
    api: HfApi,
    *,
    license: str | None,
    language: str | Sequence[str] | None,
    tags: Iterable[str],
    prose: str | None,
    mismatches: list[str],
    token: str | None,
) -> Upload:
    remarks = []
    known = public_report(report)
    if report is None:
        remarks.append("There is no report.json: the card says that nothing was measured.")
    generation = contents.generation_config_file(folder, tuned_length(known))
    pair = _pair_facts(folder, report, provenance, parameters, generation, token)
    stored = _public_provenance(provenance, pair, mismatches, folder)
    plots = contents.plot_files(folder, report_folder)
    old_card = DraftModelCard(remote.card, ignore_metadata_errors=True) if remote.card else None
    local_card = _local_card(folder)
    fresh = DraftModelCard.from_report(
        report,
        provenance=stored,
        name=repo_id,
        license=license,
        language=language,
        tags=tags,
        plots={Path(plot.path).stem.replace("_", " ").capitalize(): plot.path for plot in plots},
    )
    card, card_remark = _merged_card(fresh, local_card, old_card, prose)
    for key, value in (("license", license), ("language", language)):
        if value is not None:
            card.data[key] = fresh.data[key]
    if not card.data.get("license"):
        card.data.license = _inherited_license(api, fresh.data.get("base_model"), token)
    files = [PlannedFile(CARD_FILE, card.render().encode(), card_remark)]
    if known:
        files.append(PlannedFile(REPORT_FILE, json_bytes(known)))
    files.append(PlannedFile(PROVENANCE_FILE, json_bytes(stored.to_dict())))
    files += [file for file in contents.model_files(folder)]
    files += [generation] if generation else []
    files += plots
    new = {file.path for file in files}
    # transformers prefers a single file over shards: weights of an older version must not stay beside the new ones.
    stale = tuple(name for name in remote.files if WEIGHT_FILE.fullmatch(name) and name not in new)
    return Upload(repo_id, tuple(files), stale, card, tuple(remarks))


def _local_card(folder: Path) -> DraftModelCard | None:
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_CARD_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; that is no model card.")
    return DraftModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True)


def _merged_card(
    fresh: DraftModelCard, local: DraftModelCard | None, remote: DraftModelCard | None, prose: str | None
) -> tuple[DraftModelCard, str]:
    """The fresh figures in the words that a person wrote, wherever those are."""
    default = sections.prose_of(fresh.text)

    def edited(card: DraftModelCard | None) -> bool:
        return card is not None and _without_title(sections.prose_of(card.text)) != _without_title(default)

    local_edited, remote_edited = edited(local), edited(remote)
    if local_edited and remote_edited:
        assert local is not None and remote is not None
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
    """A card is named after its folder before it is pushed, and after the repository then: no edit of a person's."""
    return "\n".join(line for line in prose.splitlines() if not line.startswith("# "))


def _inherited_license(api: HfApi, base_model: Any, token: str | None) -> str:
    """Raises: ValueError: the base model's licence cannot be found out, so a person has to say one."""
    reason = "the draft does not start from a model on the Hub that it could inherit one from"
    if isinstance(base_model, str):
        try:
            data = api.model_info(base_model).card_data
            if data is not None and isinstance(data.get("license"), str):
                return data["license"]
            reason = f"the card of {base_model} names none"
        except (HTTPError, ConnectionError) as error:
            reason = (
                f"{base_model} could not be asked ({type(error).__name__}: {redacted(error, token).splitlines()[0]})"
            )
    raise ValueError(f"Which licence? {reason[0].upper()}{reason[1:]}. Pass `license`, for instance 'apache-2.0'.")


def _pair_facts(
    folder: Path,
    report: SpeculationReport | None,
    provenance: Provenance,
    parameters: int,
    generation: PlannedFile | None,
    token: str | None,
) -> PairFacts:
    """What can be found out about the pair now, on top of what was stored when the draft was made."""
    stored = provenance.pair or PairFacts()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    facts = {
        "draft_parameters": parameters,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "has_chat_template": tokenizer.chat_template is not None,
    }
    held = GenerationConfig.from_dict(_json(generation)) if generation else None
    draft = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    training = provenance.training or TrainingSummary()
    name = report.target.name if report else training.target
    revision = report.target.revision if report else training.target_revision
    target = None
    if name is not None:
        try:
            target = AutoConfig.from_pretrained(
                name, revision=revision if is_hub_id(name) else None, token=token, trust_remote_code=False
            )
        except (OSError, ValueError, HTTPError):
            target = None  # Not reachable from here: what was stored about it stands.
    now = PairFacts.from_configs(draft, target or draft, draft_generation_config=held, **facts)
    if target is None:
        now = dataclasses.replace(
            now, target_vocab_size=stored.target_vocab_size, same_special_ids=stored.same_special_ids
        )
    size = report.target.num_parameters if report else stored.target_parameters
    return dataclasses.replace(now, target_parameters=size)


def _json(file: PlannedFile) -> dict[str, Any]:
    import json

    return json.loads(file.read())


def _public_provenance(provenance: Provenance, pair: PairFacts, mismatches: list[str], folder: Path) -> Provenance:
    """The provenance as strangers may read it: no paths of this machine, no tokens, and what does not fit is said."""
    training = provenance.training
    if training is not None:
        names = {name: getattr(training, name) for name in ("target", "draft", "dataset")}
        training = dataclasses.replace(training, **{name: public_name(value) for name, value in names.items() if value})
    notes = [*(provenance.notes or ()), *(f"Published although: {sentence}" for sentence in mismatches)]
    return dataclasses.replace(
        provenance,
        command=redacted(without_home(provenance.command)) if provenance.command else None,
        weights_sha256=weights_checksum(folder),
        training=training,
        pair=pair,
        notes=list(dict.fromkeys(notes)) or None,
    )


def _commit(api: HfApi, plan: Upload, remote: _Remote, message: str, token: str | None) -> Upload:
    operations = [
        CommitOperationAdd(file.path, file.source if isinstance(file.source, bytes) else str(file.source))
        for file in plan.files
    ]
    deletions = [CommitOperationDelete(path) for path in plan.deleted]
    with hub_errors(f"publishing {plan.repo_id}", afterwards=_AGAIN, token=token):
        api.create_repo(plan.repo_id, private=plan.private, exist_ok=True)
        if plan.revision and plan.revision != "main":
            api.create_branch(plan.repo_id, branch=plan.revision, exist_ok=True)
        done = api.create_commit(
            plan.repo_id,
            [*deletions, *operations],
            commit_message=message,
            revision=plan.revision,
            create_pr=plan.create_pr,
            # The card was merged with what was there: if somebody edits it meanwhile, nothing is overwritten.
            parent_commit=remote.sha if not plan.create_pr else None,
        )
    return dataclasses.replace(plan, commit=done.oid, url=done.pr_url or done.commit_url)
