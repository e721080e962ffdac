"""What is stored in a saved draft's generation config."""

import resource

import pytest
from transformers import GenerationConfig

from hf_draftkd.models.draft_length import draft_length_settings, write_draft_settings


def test_a_full_disk_leaves_the_settings_before(saved_pair):
    """Half a file in the place of a draft's vocabulary and special ids, after hours of measuring."""
    folder, _ = saved_pair
    path = write_draft_settings(folder, {"draft_vocabulary": list(range(40))})
    before, names = path.read_text(), set(folder.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_draft_settings(folder, draft_length_settings(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == before
    assert set(folder.iterdir()) == names
    assert write_draft_settings(folder, draft_length_settings(4)) == path
    config = GenerationConfig.from_pretrained(folder)
    assert (config.num_assistant_tokens, len(config.draft_vocabulary)) == (4, 40)
