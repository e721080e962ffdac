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
from hf_draftkd.hub.card_merge import CARD_FILE, card_text
from hf_draftkd.hub.upload_files import PlannedFile


@dataclass(frozen=True)
class Repository:
    """A repository as it is: its last commit, who can see it, its files and card; empty where there is none.

    `afterwards` says what a failure leaves behind, and what to do then.
    """

    api: HfApi
    repo_id: str
    afterwards: str
    repo_type: str = "model"
    revision: str | None = None
    sha: str | None = None
    private: bool | None = None
    files: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    card: str | None = None

    @classmethod
    def look(cls, api: HfApi, repo_id: str, *, private: bool | None, afterwards: str, **which: Any) -> "Repository":
        """Look it up; `which` are its `repo_type` and `revision`. A public one is refused if it is to be `private`.

        A name without an owner is one of the user who is logged in.
        """
        with hub_errors(f"looking at {repo_id}", afterwards=afterwards, token=api.token):
            if "/" not in repo_id and api.token is not None:
                repo_id = f"{api.whoami()['name']}/{repo_id}"
            # Without `cardData`: huggingface_hub may be unable to take what somebody wrote there. The card is read.
            asked: Any = which | {"expand": ["private", "sha", "siblings", "tags"]}
            info: Any
            try:
                info = api.repo_info(repo_id, **asked)
            except RevisionNotFoundError:  # a branch that will be made from main
                info = api.repo_info(repo_id, **asked | {"revision": None})
            except RepositoryNotFoundError as error:
                # The Hub answers 401 for a repository that does not exist to anybody whose token it does not know.
                if error.response.status_code == 401 and api.token:
                    raise
                return cls(api, repo_id, afterwards, **which)
            _check_private(repo_id, private, info)
            files, card = tuple(sibling.rfilename for sibling in info.siblings or ()), None
            if CARD_FILE in files:
                path = api.hf_hub_download(repo_id, CARD_FILE, **which | {"revision": info.sha})
                card = card_text(Path(path), f"The card of {repo_id}")
        now: Any = {"sha": info.sha, "private": bool(info.private), "files": files, "tags": tuple(info.tags or ())}
        return cls(api, repo_id, afterwards, **which, **now, card=card)

    def stale(self, patterns: list[str], files: Sequence[PlannedFile]) -> tuple[str, ...]:
        """What is there, fits one of the patterns and is not among the new files."""
        new = {file.path for file in files}
        return tuple(name for name in filter_repo_objects(self.files, allow_patterns=patterns) if name not in new)

    def commit(
        self,
        files: Sequence[PlannedFile],
        deleted: Sequence[str],
        message: str,
        *,
        private: bool | None,
        create_pr: bool = False,
    ) -> tuple[RepoUrl, bool, CommitInfo]:
        """Make it if need be, and change it; returns its address, whether it is private, and the commit."""
        api = self.api
        here: dict[str, Any] = {"repo_id": self.repo_id, "repo_type": self.repo_type}
        with hub_errors(f"publishing {self.repo_id}", afterwards=self.afterwards, token=api.token):
            url = api.create_repo(**here, private=private, exist_ok=True)
            # `exist_ok` takes a public repository for a private one: what it is, only the Hub knows.
            info: Any = api.repo_info(**here, expand=["private"])  # type: ignore[arg-type]
            _check_private(self.repo_id, private, info)
            # `refs/pr/3`, a pull request that is brought up to date, is no branch.
            if self.revision not in (None, "main") and not str(self.revision).startswith("refs/"):
                api.create_branch(**here, branch=self.revision, exist_ok=True)
            added = [CommitOperationAdd(file.path, file.source) for file in files]
            done = api.create_commit(
                **here,
                operations=[*map(CommitOperationDelete, deleted), *added],
                commit_message=message,
                revision=self.revision,
                create_pr=create_pr,
                # The card was merged with what was there: if somebody edits it meanwhile, nothing is overwritten.
                parent_commit=self.sha if not create_pr else None,
            )
        return url, bool(info.private), done


def _check_private(repo_id: str, private: bool | None, info: Any) -> None:
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public, so what should be private would be seen by everybody; nothing was "
            "uploaded. Make it private in its settings on the Hub first, name another repository, or leave `private` "
            "out."
        )
