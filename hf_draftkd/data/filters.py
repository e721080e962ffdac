"""What keeps a synthetic query out of the data, counted by name."""

import hashlib
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable

_PUNCTUATION = ".,;:!?…\"'`“”‘’«»()[]{}¿¡।。、，；：！？（）「」『』؟،"
_SHINGLE = 5  # characters
_BANDS, _ROWS = 16, 4  # 64 hashes: two texts with 70% of their shingles in common meet in a band 99% of the time
_SIMILAR = 0.7  # estimated share of common shingles from which two queries are near-duplicates


class QueryFilter:
    """Decides on one query after the other, and counts the reasons.

    `min_characters` and `max_characters` bound a query, at least 80% of whose letters must have the Unicode `script`,
    such as `latin`, `cyrillic` or `cjk`; `keep` is any further test, such as a language detector.

    Attributes:
        counts: `kept`, and one count for each of `empty`, `unfinished`, `too_short`, `too_long`, `script`, `rejected`,
            `repeated` and `near_duplicate`.
    """

    def __init__(
        self,
        *,
        min_characters: int | None = None,
        max_characters: int | None = None,
        script: str | None = None,
        keep: Callable[[str], bool] | None = None,
    ) -> None:
        if script is not None and not _is_script(script):
            raise ValueError(
                f"No letter's Unicode name begins with {script.upper()!r}, so every query would be left out. `script` "
                "is written as latin, cyrillic, greek, arabic, hebrew, devanagari, hangul, hiragana or cjk."
            )
        if min_characters is not None and max_characters is not None and min_characters > max_characters:
            raise ValueError(f"`min_characters` is {min_characters}, above `max_characters` {max_characters}.")
        self.min_characters, self.max_characters, self.script, self.keep = min_characters, max_characters, script, keep
        self.counts: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._bands: dict[tuple[int, tuple[int, ...]], list[tuple[int, ...]]] = {}

    def __call__(self, query: str, finished: bool = True) -> bool:
        """Whether to keep `query`. `finished`: its writer ended it, instead of being cut off."""
        reason = self._reason(query, finished)
        self.counts[reason or "kept"] += 1
        return reason is None

    def _reason(self, query: str, finished: bool) -> str | None:
        if not query.strip():
            return "empty"
        if not finished:
            return "unfinished"
        if self.min_characters is not None and len(query) < self.min_characters:
            return "too_short"
        if self.max_characters is not None and len(query) > self.max_characters:
            return "too_long"
        if self.script is not None and script_share(query, self.script) < 0.8:
            return "script"
        if self.keep is not None and not self.keep(query):
            return "rejected"
        return self._duplicate(query)

    def _duplicate(self, query: str) -> str | None:
        # Punctuation counts inside of words ("2+2", "2-2"; vowel signs anywhere), and not at their ends.
        words = (word.strip(_PUNCTUATION) for word in query.casefold().split())
        plain = " ".join(filter(None, words)) or query.strip()
        if plain in self._seen:
            return "repeated"
        signature = _signature(plain)
        bands = [(band, signature[band * _ROWS : (band + 1) * _ROWS]) for band in range(_BANDS)]
        for band in bands:
            for other in self._bands.get(band, ()):
                if sum(a == b for a, b in zip(signature, other, strict=True)) >= _SIMILAR * len(signature):
                    return "near_duplicate"
        self._seen.add(plain)
        for band in bands:
            self._bands.setdefault(band, []).append(signature)
        return None


def script_share(text: str, script: str) -> float:
    """Share of the letters of `text` that belong to a Unicode script; 1 where there are no letters."""
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return 1.0
    return sum(unicodedata.name(letter, "").startswith(script.upper()) for letter in letters) / len(letters)


def _is_script(script: str) -> bool:
    letters = (chr(code) for code in range(sys.maxunicode + 1))
    return any(unicodedata.name(letter, "").startswith(script.upper()) for letter in letters if letter.isalpha())


def _signature(text: str) -> tuple[int, ...]:
    """A MinHash of the text's character shingles (Broder 1997): equal entries estimate the share of common ones."""
    shingles = {text[start : start + _SHINGLE] for start in range(max(1, len(text) - _SHINGLE + 1))}
    # One 512-bit hash a shingle gives 16 numbers of 32 bits; four keys give the 64.
    columns = []
    for key in range(_BANDS * _ROWS // 16):
        digests = [
            hashlib.blake2b(each.encode("utf-8", "replace"), key=bytes([key]), digest_size=64).digest()
            for each in shingles
        ]
        columns += [min(int.from_bytes(digest[at : at + 4], "big") for digest in digests) for at in range(0, 64, 4)]
    return tuple(columns)
