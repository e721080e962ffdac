"""A repository on the Hub as publishing needs it: look at what is there, then change it in one commit.

A wish for privacy must never end in a public upload, and what people wrote there must not be lost.
`HfApi.upload_folder` is not used: it splits a large upload into several commits, and what is published is not what lies
in the folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

from hf_draftkd.hub.access import hub_errors
from hf_draftkd.hub.card_merge import CARD_FILE
from hf_draftkd.hub.upload_files import PlannedFile


@dataclass(frozen=True)
class Remote:
    """A repository as it is: its last commit, who can see it, its files and card; empty where there is none."""

    sha: str | None = None
    private: bool | None = None
    files: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    card: str | None = None


def look(
    api: HfApi,
    repo_id: str,
    *,
    private: bool | None,
    afterwards: str,
    repo_type: str = "model",
    revision: str | None = None,
) -> tuple[str, Remote]:
    """The repository's full name, and what it holds. Refuses a public one where a private one is wanted."""
    with hub_errors(f"looking at {repo_id}", afterwards=afterwards, token=api.token):
        if "/" not in repo_id and api.token is not None:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        # Without `cardData`: huggingface_hub may be unable to take what somebody wrote there. The card itself is read.
        expand: Any = ["private", "sha", "siblings", "tags"]
        info: Any
        try:
            info = api.repo_info(repo_id, repo_type=repo_type, revision=revision, expand=expand)
        except RevisionNotFoundError:  # a branch that will be made from main
            info = api.repo_info(repo_id, repo_type=repo_type, expand=expand)
        except RepositoryNotFoundError as error:
            # The Hub answers 401 for a repository that does not exist to anybody whose token it does not know.
            if error.response.status_code == 401 and api.token:
                raise
            return repo_id, Remote()
        _check_private(repo_id, private, info)
        files, card = tuple(sibling.rfilename for sibling in info.siblings or ()), None
        if CARD_FILE in files:
            path = api.hf_hub_download(repo_id, CARD_FILE, revision=info.sha, repo_type=repo_type)
            card = Path(path).read_text(encoding="utf-8-sig")
    return repo_id, Remote(info.sha, bool(info.private), files, tuple(info.tags or ()), card)


def _check_private(repo_id: str, private: bool | None, info: Any) -> None:
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public, so what should be private would be seen by everybody; nothing was "
            "uploaded. Make it private in its settings on the Hub first, name another repository, or leave `private` "
            "out."
        )


def stale(remote: Remote, patterns: list[str], files: Sequence[PlannedFile]) -> tuple[str, ...]:
    new = {file.path for file in files}
    return tuple(name for name in filter_repo_objects(remote.files, allow_patterns=patterns) if name not in new)


def commit(
    api: HfApi,
    repo_id: str,
    files: Sequence[PlannedFile],
    deleted: Sequence[str],
    remote: Remote,
    private: bool | None,
    message: str,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str = "model",
) -> tuple[RepoUrl, bool, CommitInfo]:
    url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    # `exist_ok` takes a public repository for a private one: what it is, only the Hub knows.
    info: Any = api.repo_info(repo_id, repo_type=repo_type, expand=["private"])  # type: ignore[arg-type]
    _check_private(repo_id, private, info)
    if revision and revision != "main":
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    added = [CommitOperationAdd(file.path, file.source) for file in files]
    done = api.create_commit(
        repo_id,
        [*map(CommitOperationDelete, deleted), *added],
        commit_message=message,
        repo_type=repo_type,
        revision=revision,
        create_pr=create_pr,
        # The card was merged with what was there: if somebody edits it meanwhile, nothing is overwritten.
        parent_commit=remote.sha if not create_pr else None,
    )
    return url, bool(info.private), done
