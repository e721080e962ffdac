"""Who can see a repository: a wish for privacy must never end in a public upload.

Here and not in `hub`, since alignment data is published from this room and drafts from that one.
"""

from huggingface_hub import HfApi


def make_repository(api: HfApi, repo_id: str, *, private: bool | None, repo_type: str | None = None) -> bool:
    """Create a repository where there is none, and return whether it is private.

    Args:
        api: Who publishes.
        repo_id: `user/name`.
        private: True for a private one; None leaves a new one to its owner's default, and False makes it public. One
            that exists stays as it is.
        repo_type: As in `huggingface_hub`; None is a model.

    Raises:
        ValueError: It was to be private, and exists and is public.
    """
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    # `exist_ok` takes a public repository for a private one: what it is, only the Hub knows.
    is_private = bool(api.repo_info(repo_id, repo_type=repo_type).private)
    if private and not is_private:
        raise ValueError(public_refusal(repo_id))
    return is_private


def public_refusal(repo_id: str) -> str:
    """Why nothing private goes into a public repository, and what to do."""
    return (
        f"{repo_id} exists and is public, so what should be private would be seen by everybody; nothing was uploaded. "
        "Make it private in its settings on the Hub first, name another repository, or leave `private` out."
    )
