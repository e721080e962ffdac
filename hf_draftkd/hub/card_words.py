"""The card of alignment data written again: its own figures anew, the words and metadata that people added kept."""

from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from hf_draftkd.hub.card_sections import prose_of, with_sections
from hf_draftkd.hub.repositories import MAX_CARD_BYTES

Prose = Literal["hub", "local"]
# Metadata that says what the data are: written anew, or united with what people added. All else is theirs.
_UNITED = ("tags", "task_categories")
_ANEW = ("size_categories",)


def read_card(text: str, where: str) -> DatasetCard:
    """A card that somebody may have edited.

    Raises:
        ValueError: Its metadata is no YAML, or no mapping; `where` it is, is said.
    """
    try:
        return DatasetCard(text, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"The metadata of {where} cannot be read ({problem}). Correct it first.") from None


def local_card(path: Path) -> DatasetCard | None:
    """The card in a file; None where there is none.

    Raises:
        ValueError: It is too large, or its metadata cannot be read.
    """
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_CARD_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; that is no card.")
    return read_card(path.read_text(encoding="utf-8-sig"), str(path))


def updated(held: DatasetCard | None, fresh: DatasetCard) -> DatasetCard:
    """The figures of a fresh card in the words, and with the metadata, of one that people may have edited."""
    if held is None:
        return fresh
    return _card(_metadata(_plain(held), fresh), _text(held, fresh))


def merged(
    fresh: DatasetCard, local: DatasetCard | None, remote: DatasetCard | None, prose: Prose | None = None
) -> DatasetCard:
    """The card to publish.

    Args:
        fresh: With the figures.
        local: In the folder.
        remote: On the Hub.
        prose: Whose words and metadata win where both were edited; None refuses to choose.

    Raises:
        ValueError: Both were edited, differently.
    """
    if local is None or remote is None:
        return updated(local or remote, fresh)
    if prose is None and (differing := _contradictions(fresh, local, remote)):
        raise ValueError(
            f"The card was edited on the Hub, and README.md in the folder was edited too, differently "
            f"({', '.join(differing)}). Make both say the same (put the Hub's README.md into the folder, or the other "
            "way round), or call `push_alignment_data` with prose='hub' or prose='local'."
        )
    remote_first = prose == "hub" or (prose is None and _words(remote, fresh) != _words(fresh, fresh))
    first, second = (remote, local) if remote_first else (local, remote)
    metadata = _metadata(_plain(second), fresh)
    return _card(_metadata(_plain(first), _card(metadata, "")), _text(first, fresh))


def _contradictions(fresh: DatasetCard, local: DatasetCard, remote: DatasetCard) -> list[str]:
    """What people wrote differently in both places."""
    here, there = _plain(local), _plain(remote)
    differing = [
        f"`{key}`" for key in here if key in there and key not in (*_UNITED, *_ANEW) and here[key] != there[key]
    ]
    words = {_words(card, fresh) for card in (fresh, local, remote)}
    return [*differing, "the text"] if len(words) == 3 else differing


def _metadata(held: dict[str, Any], fresh: DatasetCard) -> dict[str, Any]:
    """Held metadata win; tags are united; figures are the fresh ones."""
    new = _plain(fresh)
    united = {key: list(dict.fromkeys([*_listed(held.get(key)), *_listed(new.get(key))])) for key in _UNITED}
    return {**new, **held, **united, **{key: new[key] for key in _ANEW}}


def _words(card: DatasetCard, fresh: DatasetCard) -> str:
    """What a card says outside its sections. The Hub's form for a new repository makes one of metadata alone."""
    return prose_of(card.text) or prose_of(fresh.text)


def _text(held: DatasetCard, fresh: DatasetCard) -> str:
    return with_sections(held.text, fresh.text) if prose_of(held.text) else fresh.text


def _plain(card: DatasetCard) -> dict[str, Any]:
    return card.data.to_dict()


def _listed(value: Any) -> list[str]:
    """Metadata that may be one value or several, as people write them."""
    return [str(item) for item in (value if isinstance(value, list) else [value]) if item is not None]


def _card(metadata: dict[str, Any], text: str) -> DatasetCard:
    return DatasetCard(f"---\n{DatasetCardData(**metadata).to_yaml()}\n---\n{text}", ignore_metadata_errors=True)
