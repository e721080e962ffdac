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

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    eval_result_entries_to_yaml,
    get_token,
)
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import ExpandModelProperty_T
from huggingface_hub.utils import validate_repo_id

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub import planning, upload_files
from hf_draftkd.hub.access import hub_errors, writing_token
from hf_draftkd.hub.metadata import benchmark_entries
from hf_draftkd.hub.model_card import DraftModelCard
from hf_draftkd.hub.names import public_report
from hf_draftkd.hub.planning import DraftFolder
from hf_draftkd.hub.provenance import PROVENANCE_FILE
from hf_draftkd.hub.report_tables import tuned_length
from hf_draftkd.hub.repositories import make_repository, public_refusal, remote_card
from hf_draftkd.hub.upload_files import CARD_FILE, REPORT_FILE, PlannedFile, json_bytes
from hf_draftkd.models.identity import WEIGHT_FILE

_VISIBILITY = {True: "private", False: "public", None: "new, public or private as its owner's default says"}
_BENCHMARK_FILE = ".eval_results/draftkd.yaml"
# Not `cardData`, which huggingface_hub may be unable to take: the card itself is read.
_EXPAND: list[ExpandModelProperty_T] = ["private", "sha", "siblings", "tags"]
_AGAIN = "Nothing was published, nothing on disk has changed: the same command tries again."


@dataclass(frozen=True)
class Upload:
    """What is, or was, published.

    Args:
        repo_id: The repository, with its owner.
        files: What goes in, in order.
        deleted: Paths of an older version in the repository that go out in the same commit.
        card: The model card among `files`.
        remarks: What a person should know before (or after) it happens.
        private: Whether the repository is private, or will be; None before a new one is made by its owner's default.
        revision, create_pr: As passed to `push_draft`.
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
        lines = [f"{kind} {self.repo_id}{where}, {_VISIBILITY[self.private]}:"]
        lines += [
            f"  {file.path:<{width}}  {file.size:>13,} bytes{f'  {file.remark}' if file.remark else ''}"
            for file in self.files
        ]
        lines += [f"  {path:<{width}}  deleted: belongs to an older version" for path in self.deleted]
        lines += [f"note: {remark}" for remark in self.remarks]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Remote:
    """The repository as it is: its last commit, its files, its card, who can see it; all empty where there is none."""

    sha: str | None = None
    private: bool | None = None
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
    benchmark_task: str | None = None,
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
            keeps its visibility; True refuses one that is public.
        revision: Branch to commit to; made where it does not exist.
        create_pr: Open a pull request instead of committing.
        commit_message: First line of the commit.
        benchmark_task: Also write a leaderboard result (`.eval_results/`) for this task of the benchmark that the
            report's prompts come from.
        prose: Whose words win where card and folder were both edited: "hub" or "local".
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
    if prose not in (None, "hub", "local"):
        raise ValueError(f"`prose` must be 'hub' or 'local', got {prose!r}.")
    _check_repo_id(repo_id)
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request is opened against main; leave out revision={revision!r} or `create_pr`.")
    draft = planning.look_at_folder(folder, report)
    if draft.contradictions and not allow_mismatch:
        raise ValueError(
            f"Report, provenance and weights do not belong together. {' '.join(draft.contradictions)} Evaluate this "
            "draft again (`draftkd evaluate`), or pass `allow_mismatch` and the card will say so."
        )
    token = token or get_token() if dry_run else writing_token(token)
    api = HfApi(token=token)
    repo_id = _with_owner(api, repo_id, dry_run=dry_run, token=token)
    remote, remarks = _look_at_hub(api, repo_id, revision, dry_run=dry_run, token=token)
    if private and remote.private is False:
        raise ValueError(public_refusal(repo_id))
    if remote.files and not allow_mismatch and _holds_another_model(remote):
        raise ValueError(
            f"{repo_id} exists and holds a model that is not a draft (its card lacks the tag `draft-model`). Name "
            "another repository, or pass `allow_mismatch` to overwrite it."
        )
    words = {"license": license, "language": language, "tags": tags}
    plan = _plan(api, draft, repo_id, remote, words=words, task=benchmark_task, prose=prose, token=token)
    plan = dataclasses.replace(
        plan,
        private=private if remote.private is None else remote.private,
        revision=revision,
        create_pr=create_pr,
        remarks=(*remarks, *plan.remarks),
    )
    upload_files.refuse_secrets(plan.files, token)
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
        info = api.model_info(repo_id, expand=_EXPAND)
    except RepositoryNotFoundError as error:
        # The Hub answers 401 for a repository that does not exist to anybody whose token it does not know.
        if error.response.status_code == 401 and api.token:
            raise
        return _Remote()
    if revision and revision != "main":
        branches = {branch.name: branch for branch in api.list_repo_refs(repo_id).branches}
        info = api.model_info(repo_id, revision=revision if revision in branches else None, expand=_EXPAND)
    files = tuple(sibling.rfilename for sibling in info.siblings or ())
    text = remote_card(api, repo_id, files, info.sha)
    return _Remote(sha=info.sha, private=bool(info.private), files=files, tags=tuple(info.tags or ()), card=text)


def _holds_another_model(remote: _Remote) -> bool:
    has_weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in remote.files)
    return has_weights and "draft-model" not in remote.tags


def _plan(
    api: HfApi,
    draft: DraftFolder,
    repo_id: str,
    remote: _Remote,
    *,
    words: dict[str, Any],
    task: str | None,
    prose: str | None,
    token: str | None,
) -> Upload:
    known = public_report(draft.report)
    generation = upload_files.generation_config_file(draft.path, tuned_length(known))
    pair = planning.pair_facts(draft, generation, token)
    stored = planning.public_provenance(draft, pair)
    plots = upload_files.plot_files(draft.path, draft.report_folder)
    old_card = planning.read_card(remote.card, f"the card of {repo_id}") if remote.card else None
    local_card = planning.local_card(draft.path)
    fresh = DraftModelCard.from_report(
        draft.report,
        provenance=stored,
        name=repo_id,
        **words,
        plots={Path(plot.path).stem.replace("_", " ").capitalize(): plot.path for plot in plots},
    )
    card, card_remark = planning.merged_card(fresh, local_card, old_card, prose)
    for key in ("license", "language"):
        if words[key] is not None:
            card.data[key] = fresh.data[key]
    if not card.data.get("license") and local_card is not None and local_card.data.get("license"):
        card.data["license"] = local_card.data["license"]
    if not card.data.get("license"):
        for key, value in planning.inherited_license(api, fresh.data.get("base_model"), token).items():
            card.data[key] = value
    files = [PlannedFile(CARD_FILE, card.render().encode(), card_remark)]
    if known:
        files.append(PlannedFile(REPORT_FILE, json_bytes(known)))
    files.append(PlannedFile(PROVENANCE_FILE, json_bytes(stored.to_dict())))
    files += upload_files.model_files(draft.path)
    files += [generation] if generation else []
    files += plots
    if task is not None:
        entries = eval_result_entries_to_yaml(benchmark_entries(known, task))
        files.append(PlannedFile(_BENCHMARK_FILE, yaml.safe_dump(entries, sort_keys=False).encode()))
    new = {file.path for file in files}
    stale = tuple(name for name in remote.files if _is_ours(name) and name not in new)
    remarks = [*draft.remarks]
    if not known:
        remarks.append(f"There is no {REPORT_FILE} of this draft: the card says that nothing was measured.")
    return Upload(repo_id, tuple(files), stale, card, tuple(remarks))


def _is_ours(name: str) -> bool:
    """Files of an older version that must not stay beside the new ones.

    transformers prefers a single weight file over shards, and figures of other weights would mislead.
    """
    is_figures = name in (REPORT_FILE, _BENCHMARK_FILE) or name.startswith(f"{upload_files.PLOT_FOLDER}/")
    return is_figures or bool(WEIGHT_FILE.fullmatch(name))


def _commit(api: HfApi, plan: Upload, remote: _Remote, message: str, token: str | None) -> Upload:
    operations = [
        CommitOperationAdd(file.path, file.source if isinstance(file.source, bytes) else str(file.source))
        for file in plan.files
    ]
    deletions = [CommitOperationDelete(path) for path in plan.deleted]
    with hub_errors(f"publishing {plan.repo_id}", afterwards=_AGAIN, token=token):
        _, is_private = make_repository(api, plan.repo_id, private=plan.private)
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
    return dataclasses.replace(plan, private=is_private, commit=done.oid, url=done.pr_url or done.commit_url)
