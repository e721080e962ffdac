import pytest
from datasets import Dataset

from hf_draftkd.data.mixing import mix_datasets, parse_mix

ALIGNMENT = Dataset.from_dict({"input_ids": [[number] for number in range(900)]})


@pytest.mark.parametrize("size", [7, 60, 5000])
@pytest.mark.parametrize(("mix", "share"), [("9:1", 0.1), ("1:1", 0.5), ("1:3", 0.75)])
def test_parts_are_as_asked_and_no_alignment_row_is_lost(size, mix, share):
    """`interleave_datasets` alone stops when the smaller data set runs out, or repeats rows of both."""
    text = Dataset.from_dict({"input_ids": [[1000 + number] for number in range(size)]})
    found = [row["input_ids"][0] for row in mix_datasets(ALIGNMENT, text, mix, seed=1)]
    ours = [number for number in found if number < 1000]
    theirs = [number - 1000 for number in found if number >= 1000]
    assert ours == list(range(900))
    assert theirs == [number % size for number in range(len(theirs))]
    spread = (900 * share) ** 0.5 / (1 - share)
    assert abs(len(theirs) - 900 * share / (1 - share)) < 4 * spread


def test_the_order_follows_from_the_seed():
    text = Dataset.from_dict({"input_ids": [[1000]] * 50})
    orders = [mix_datasets(ALIGNMENT, text, None, seed)["input_ids"][:] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("mix", ["9", "9:1:1", "a:b", "9:0", "-1:1", "nan:1", ""])
def test_a_mix_that_makes_no_sense_is_refused(mix):
    with pytest.raises(ValueError, match="mix"):
        parse_mix(mix)
