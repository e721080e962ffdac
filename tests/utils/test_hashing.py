"""Hashes of contents: what enters them, and that they stay the same from one version to the next."""

import hashlib

import torch

from hf_draftkd.utils.hashing import derived_seed, hash_number, list_hash, sha256


def test_texts_and_tensors_enter_by_their_bytes():
    """Catches a change that would give every published checksum and every data folder another name."""
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    expected = hashlib.sha256("ä\n".encode() + bytes.fromhex("803f 0040 4040 8040")).hexdigest()
    assert sha256(["ä", "\n", tensor]) == expected
    assert sha256(["ä\n", tensor.t().contiguous().t()]) == expected, "memory order does not count"
    assert sha256([torch.tensor(7)]) == hashlib.sha256(bytes([7, 0, 0, 0, 0, 0, 0, 0])).hexdigest()


def test_numbers_come_from_the_contents_alone():
    """Catches Python's own `hash`, which differs from process to process."""
    assert hash_number("a") == int.from_bytes(hashlib.sha256(b"a").digest()[:8], "big")
    assert derived_seed(0, "queries", 1) == 3125380206557851919
    assert len({derived_seed(seed, part) for seed in range(4) for part in range(4)}) == 16
    assert all(0 <= derived_seed(part) < 2**63 for part in range(64))


def test_the_border_between_two_texts_counts():
    assert list_hash(["ab", "c"]) != list_hash(["a", "bc"])
    assert list_hash(["ab", "c"]) == list_hash(iter(["ab", "c"]))
