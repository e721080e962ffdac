"""A shard's journal, cut off where a kill or a power cut may cut it off."""

import numpy as np
import pytest

from hf_draftkd.data.backends import Completion
from hf_draftkd.data.journal import Journal
from hf_draftkd.data.kept_distributions import CacheOptions


def completion(length, form):
    """One with distributions, or, of a server, without."""
    if form is None:
        return Completion(list(range(length)), "length", "text", "retokenized")
    logprobs = -np.arange(length, dtype=np.float16) / 3
    columns = {"completion_logprobs": logprobs, "target_temperature": 2.5, "target_vocab_size": 300}
    if form == "top_k":
        ids = np.arange(2 * length, dtype=np.int32).reshape(length, 2)
        columns |= {"target_token_ids": ids, "target_logprobs": ids.astype(np.float16)}
        columns |= {"target_tail_logprob": np.full(length, -np.inf, dtype=np.float16)}
    else:
        ids = [np.arange(1 + place % 3, dtype=np.int32) for place in range(length)]
        columns |= {"target_token_ids": ids, "target_counts": [1 + each for each in ids]}
    return Completion(list(range(length)), "stop", distributions=columns)


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert (one.token_ids, one.finish_reason, one.text) == (other.token_ids, other.finish_reason, other.text)
        assert one.ids_source == other.ids_source
        assert (one.distributions is None) == (other.distributions is None)
        for name, values in (other.distributions or {}).items():
            kept = one.distributions[name]
            pairs = zip(kept, values, strict=True) if isinstance(values, list) else [(kept, values)]
            for these, those in pairs:
                np.testing.assert_array_equal(np.asarray(these, dtype=np.float64), np.asarray(those, dtype=np.float64))


@pytest.mark.parametrize("form", ["top_k", "sampled"])
def test_cut_off_anywhere_it_holds_whole_groups_and_is_continued(tmp_path, form):
    brought = CacheOptions(**{form: 2}).features(300)
    groups = [
        (0, {4: completion(3, form), 1: completion(1, form)}),
        (1, {0: completion(5, None)}),
        (0, {2: completion(2, form)}),
    ]

    def opened(path):
        return Journal(path, brought, lambda *_, **__: None)

    whole, ends = tmp_path / "whole", []
    journal = opened(whole)
    for setting, completions in groups:
        journal.add(setting, completions)
        ends.append(whole.stat().st_size)
    content = whole.read_bytes()
    path = tmp_path / "cut"
    for end in [*range(0, len(content), 1511), *ends, *(each - 1 for each in ends)]:
        path.write_bytes(content[:end])
        number = sum(each <= end for each in ends)
        for setting, completions in groups[number:]:
            opened(path).add(setting, completions)
        again = opened(path)
        for setting in (0, 1):
            expected = {place: each for at, group in groups if at == setting for place, each in group.items()}
            assert_equal(again.finished(setting), expected)


def test_what_is_no_journal_of_these_columns_is_begun_anew(tmp_path):
    """Of another version, or zeros, as a file system may leave them after a power cut."""
    path = tmp_path / "journal"
    Journal(path, None, lambda *_, **__: None).add(0, {0: completion(3, None)})
    for content in (path.read_bytes(), bytes(1000)):
        path.write_bytes(content)
        journal = Journal(path, CacheOptions(top_k=2).features(300), lambda *_, **__: None)
        assert journal.finished(0) == {}
        journal.add(0, {0: completion(3, "top_k")})
        again = Journal(path, CacheOptions(top_k=2).features(300), lambda *_, **__: None)
        assert list(again.finished(0)) == [0]


def test_it_goes_when_the_shard_is_whole_and_stays_after_a_failure(tmp_path):
    path = tmp_path / "journal"
    with pytest.raises(ZeroDivisionError), Journal(path, None, lambda *_, **__: None):
        raise ZeroDivisionError
    assert path.exists()
    with Journal(path, None, lambda *_, **__: None):
        pass
    assert not path.exists()


def test_another_process_may_take_it_away_once_the_shard_is_there(tmp_path):
    """FileNotFoundError at the very end of a run: the first process saw all shards, and tidied up."""
    path = tmp_path / "journal"
    with Journal(path, None, lambda *_, **__: None):
        path.unlink()
