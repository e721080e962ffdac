"""A card written again: its sections and measured metadata are new, what people wrote beside them is kept.

A section stands between two marks, and each mark is a whole line. Escaped data never fills a whole line, so no name
or text from a report can fake one. Where somebody removed an end mark, what follows is theirs, not a section.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from huggingface_hub import RepoCard

from hf_draftkd.utils.checks import one_of

CARD_FILE = "README.md"
Place = Literal["hub", "local"]
Card = TypeVar("Card", bound=RepoCard)

_HINT = "written by hf_draftkd; put your own text outside these marks"
_SECTION = re.compile(
    r"^<!-- draftkd:begin (?P<name>[a-z]+)[^\n]*-->[ \t]*\r?\n(?:(?!^<!-- draftkd:begin ).)*?"
    r"^<!-- draftkd:end (?P=name) -->[ \t]*\r?$\n?",
    re.MULTILINE | re.DOTALL,
)
# Metadata that follows from the weights or rows: taken from the fresh card, or united with what people added. All else
# is theirs.
_DERIVED = ("base_model", "datasets", "library_name", "pipeline_tag", "size_categories", "model-index")
_UNITED = ("tags", "task_categories")


def marked(name: str, content: str) -> str:
    """A section between its marks; an empty one keeps them, so that it can be filled later."""
    body = content.strip("\n")
    body = f"{body}\n" if body else ""
    return f"<!-- draftkd:begin {name} | {_HINT} -->\n{body}<!-- draftkd:end {name} -->\n"


def sections_of(text: str) -> dict[str, str]:
    """Section name to its text, marks included, in order of appearance."""
    return {match["name"]: match[0] for match in _SECTION.finditer(text)}


def prose_of(text: str) -> str:
    """What is left of a card's text without its sections, blank lines aside: the part that people write."""
    lines = (line.rstrip() for line in _SECTION.sub("", text).splitlines())
    return "\n".join(line for line in lines if line)


def with_sections(prose: str, fresh: str) -> str:
    """The prose of one card, whose words and order of sections are kept, with the sections of a fresh one.

    Without words (the Hub's form for a new repository writes metadata alone) `fresh` is the whole text. A section that
    `prose` lacks is put at the end; one that `fresh` lacks is emptied: it described other weights.
    """
    if not prose_of(prose):
        return fresh
    new = sections_of(fresh)
    used = set()

    def replace(match: re.Match[str]) -> str:
        # A name twice in one card: the second copy is stale and goes.
        name = match["name"]
        if name in used:
            return ""
        used.add(name)
        return new.get(name, marked(name, ""))

    result = _SECTION.sub(replace, prose)
    missing = [section for name, section in new.items() if name not in used]
    return result.rstrip("\n") + "\n\n" + "\n".join(missing) if missing else result


def read_card(kind: type[Card], text: str | None, where: str) -> Card | None:
    """A card that somebody may have edited, if there is one; results in its metadata that cannot be read are dropped.

    A `ValueError` says `where` it is, if its metadata is not a YAML mapping.
    """
    if not text:
        return None
    try:
        card = kind(text, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"The metadata of {where} cannot be read ({problem}). Correct it first.") from None
    languages = card.data.get("language")
    if any(each is False for each in _items(languages)):
        # Norwegian, which the Hub reads as such: to YAML 1.1, and so to PyYAML, a bare `no` is a boolean.
        card.data["language"] = ["no" if each is False else each for each in _items(languages)]
    return card


def card_text(path: Path, where: str) -> str:
    """The text of a card that somebody may have edited; a `ValueError` says `where` it is, if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}): save it as such.") from None


def local_card(kind: type[Card], folder: Path) -> Card | None:
    """As `read_card`, of the card in a folder."""
    path = folder / CARD_FILE
    return read_card(kind, card_text(path, str(path)) if path.is_file() else None, str(path))


def merged(
    fresh: Card,
    local: Card | None,
    remote: Card | None = None,
    prose: Place | None = None,
    given: Collection[str] = (),
) -> tuple[Card, Place | None]:
    """The card to publish, with the sections of `fresh`, and where its words come from (None: nobody wrote any).

    `local` is the card in the folder, `remote` that on the Hub. Where both were edited, differently, `prose` says whose
    words and metadata win; None refuses to choose. `given` are keys of the metadata that the caller settled.
    """
    if prose is not None:
        one_of("`prose`", prose, ("hub", "local"))
    places: dict[Place, Card | None] = {"local": local, "hub": remote}
    held = {place: card for place, card in places.items() if card is not None}
    edited = [place for place, card in held.items() if prose_of(card.text) not in ("", prose_of(fresh.text))]
    if prose is None and local and remote:
        here, there = local.data.to_dict(), remote.data.to_dict()
        theirs = [key for key in here if key in there and key not in (*_DERIVED, *_UNITED, *given)]
        differing = [f"`{key}`" for key in theirs if here[key] != there[key]]
        if len(edited) == 2 and prose_of(local.text) != prose_of(remote.text):
            differing.append("the text")
        if differing:
            raise ValueError(
                f"The card was edited on the Hub, and {CARD_FILE} in the folder was edited too, differently "
                f"({', '.join(differing)}). Make both say the same, or choose whose to keep with prose='hub' or "
                "prose='local'."
            )
    first = prose if prose in held else edited[-1] if edited else None
    metadata = fresh.data.to_dict()
    for place in sorted(held, key=lambda place: place == first):  # the one that wins comes last
        metadata = _metadata(held[place], metadata)
    text = with_sections(held[first].text, fresh.text) if first else fresh.text
    data = fresh.card_data_class(**metadata, ignore_metadata_errors=True)
    return type(fresh)(f"---\n{data.to_yaml()}\n---\n{text}", ignore_metadata_errors=True), first


def _metadata(held: RepoCard, new: dict[str, Any]) -> dict[str, Any]:
    """Held metadata win, except what follows from the weights or rows; the tag of a former target is dropped."""
    old = {key: value for key, value in held.data.to_dict().items() if key != "model-index"}
    united = {}
    for key in _UNITED:
        kept = [item for item in _listed(old.get(key)) if not item.startswith("draft-for:")]
        united[key] = list(dict.fromkeys([*kept, *_listed(new.get(key))]))
    derived = {key: new[key] for key in _DERIVED if key in new}
    return {key: value for key, value in (new | old | united | derived).items() if value != []}


def _listed(value: Any) -> list[str]:
    return [str(item) for item in _items(value) if item is not None]


def _items(value: Any) -> list[Any]:
    """Metadata that may be one value or several, as people write them."""
    return value if isinstance(value, list) else [value]
