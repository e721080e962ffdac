"""Repositories on the Hub as both kinds of publishing need them, of alignment data here and of drafts in `hub`.

A wish for privacy must never end in a public upload, and what people wrote there must not be lost.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoUrl

CARD_FILE = "README.md"
MAX_CARD_BYTES = 2**20


def make_repository(
    api: HfApi, repo_id: str, *, private: bool | None, repo_type: str | None = None
) -> tuple[RepoUrl, bool]:
    """Create a repository where there is none; returns its address and whether it is private.

    Args:
        api: Who publishes.
        repo_id: `user/name`, or `name` for the user who is logged in.
        private: True for a private one; None leaves a new one to its owner's default, and False makes it public. One
            that exists stays as it is.
        repo_type: As in `huggingface_hub`; None is a model.

    Raises:
        ValueError: It was to be private, and exists and is public.
    """
    url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    # `exist_ok` takes a public repository for a private one: what it is, only the Hub knows.
    # Asked for alone: metadata that somebody wrote may be more than huggingface_hub can take.
    expand: Any = ["private"]  # annotated there as a single one
    is_private = bool(api.repo_info(url.repo_id, repo_type=repo_type, expand=expand).private)
    if private and not is_private:
        raise ValueError(public_refusal(url.repo_id))
    return url, is_private


def public_refusal(repo_id: str) -> str:
    """Why nothing private goes into a public repository, and what to do."""
    return (
        f"{repo_id} exists and is public, so what should be private would be seen by everybody; nothing was uploaded. "
        "Make it private in its settings on the Hub first, name another repository, or leave `private` out."
    )


def remote_card(
    api: HfApi, repo_id: str, files: Collection[str], revision: str | None, repo_type: str | None = None
) -> str | None:
    """The text of a repository's card; None where it has none.

    Args:
        api: Who asks.
        repo_id: The repository.
        files: Its files, as listed.
        revision: Its commit.
        repo_type: As in `huggingface_hub`.

    Raises:
        ValueError: It is too large to be one.
    """
    if CARD_FILE not in files:
        return None
    entries = api.get_paths_info(repo_id, CARD_FILE, revision=revision, repo_type=repo_type)
    size = sum(getattr(entry, "size", 0) for entry in entries)
    if size > MAX_CARD_BYTES:
        raise ValueError(f"The card of {repo_id} has {size:,} bytes; that is no card. Look at it on the Hub.")
    path = api.hf_hub_download(repo_id, CARD_FILE, revision=revision, repo_type=repo_type)
    return Path(path).read_text(encoding="utf-8-sig")
