"""What a model or data set may be called."""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def is_hub_id(name: object) -> bool:
    """Whether a name can be the id of a repository on the Hub (`org/name` or `name`), as opposed to a local path."""
    if not isinstance(name, str) or name.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
