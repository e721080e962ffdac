"""Hashes of contents, the same on every machine: what tells two data sets, weights or requests apart."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch


def sha256(pieces: Iterable[str | torch.Tensor]) -> str:
    """SHA-256 over texts (in UTF-8) and tensors (their bytes, without type or shape), in order.

    The pieces are joined without a separator: whoever hashes a list marks where each piece ends.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        if isinstance(piece, torch.Tensor):
            digest.update(piece.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data)
        else:
            digest.update(piece.encode())
    return digest.hexdigest()


def list_hash(texts: Iterable[str]) -> str:
    """A short hash of texts, in order; their lengths keep ["ab", "c"] apart from ["a", "bc"].

    Returns:
        16 hexadecimal digits.
    """
    return sha256(f"{len(text)}:{text}" for text in texts)[:16]


def hash_number(text: str) -> int:
    """The first 64 bits of a text's SHA-256: a number in [0, 2**64) that the text alone decides."""
    return int(sha256([text])[:16], 16)


def derived_seed(*parts: Any) -> int:
    """One seed for one part of the work, from values whose `repr` is the same on every machine."""
    return hash_number(repr(parts)) >> 1  # below 2**63, as torch requires
