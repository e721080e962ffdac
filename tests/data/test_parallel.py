"""Blocks of mask tokens: each says what a separate pass over its text and mask tokens says."""

import pytest
import torch

from examples.benchmarks.tiny_architectures import tiny_model
from hf_draftkd.data.parallel import check_reads_mask_tokens, draw_depths, parallel_rows, retained
from tests.tiny import ARCHITECTURES, tiny_llama

MASK = 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_blocks_are_separate_passes(architecture: str) -> None:
    """A block that sees another, a row's later tokens or padding, or that stands at the wrong place, would differ."""
    model = ARCHITECTURES[architecture]().double()
    ids = torch.randint(6, 290, (2, 12))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 9:] = 0
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[0, [2, 3, 4, 5, 8, 9, 10]] = True  # two answers, the user between them
    keep[1, [4, 5, 6, 7]] = True
    depths = torch.tensor([3, 1, 4, 4, 2, 3, 3, 4, 4, 1, 2])
    rows = parallel_rows({"input_ids": ids, "attention_mask": attention_mask}, keep, depths, MASK)
    found = model(**rows.inputs).logits[rows.keep]
    # Cut at the end of each answer.
    taught = torch.tensor([3, 1, 2, 1, 2, 2, 1, 4, 3, 1, 1])
    assert len(found) == taught.sum()
    checked = 0
    for number, (row, place) in enumerate(keep.nonzero().tolist()):
        count = int(taught[number])
        text = torch.cat([ids[row, : place + 1], torch.full((count - 1,), MASK)])[None]
        expected = model(text).logits[0, place:]
        mine = rows.source - rows.depth + 1 == number
        assert rows.depth[mine].tolist() == list(range(1, count + 1))
        torch.testing.assert_close(found[mine], expected, atol=1e-9, rtol=1e-9)
        checked += count
    assert checked == len(found)


def test_deeper_copies_are_dropped_in_the_shares_of_the_paper() -> None:
    depths = draw_depths(1000, 8)
    assert [int((depths > depth).sum()) for depth in range(8)] == pytest.approx(
        [1000, 700, 490, 343, 240, 200, 200, 200], abs=1
    )
    assert sum(retained(8)) == pytest.approx(3.3731)
    assert draw_depths(0, 4).shape == (0,)


def test_a_batch_without_anything_to_learn() -> None:
    ids = torch.randint(6, 290, (2, 5))
    rows = parallel_rows({"input_ids": ids}, torch.zeros_like(ids, dtype=torch.bool), torch.zeros(0).long(), MASK)
    assert rows.inputs["input_ids"].equal(ids)
    assert not rows.keep.any()


@pytest.mark.parametrize("kind", ["bloom", "mpt", "gemma3_text"])
def test_architectures_that_cannot_read_them_are_refused(kind: str) -> None:
    """Without a word the deeper tokens would be learned from rows that no decoding ever shows."""
    with pytest.raises(ValueError, match=rf"model type '{kind}'.*parallel_tokens"):
        check_reads_mask_tokens(tiny_model(kind), MASK, 4, 2048)


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox", "mixtral", "cohere"])
def test_others_are_not(kind: str) -> None:
    check_reads_mask_tokens(tiny_model(kind), MASK, 4, 2048)
    check_reads_mask_tokens(tiny_model(kind).bfloat16(), MASK, 4, 2048)


def test_eager_attention_reads_them_and_others_are_named() -> None:
    model = tiny_llama(attn_implementation="eager")
    model.set_attn_implementation("eager")
    check_reads_mask_tokens(model, MASK, 4, 64)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"flex_attention.*sdpa"):
        check_reads_mask_tokens(model, MASK, 4, 64)
