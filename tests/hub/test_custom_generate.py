"""Code beside a draft: what `generate(custom_generate="org/draft")` runs, and when it is published."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from hf_draftkd.hub.upload_files import custom_generate_files
from tests.hub.fake_hub import FakeHub
from tests.hub.pushing import ID, PUBLISHED, push
from tests.tiny import tiny_pair, tiny_prompts

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
FILES = {"custom_generate/generate.py", "custom_generate/requirements.txt"}


def test_it_decodes_from_a_folder(tmp_path, tokenizer, monkeypatch):
    """The call of the card, as a user types it: catches arguments that transformers no longer hands on."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    draft, target = tiny_pair()
    draft.generation_config.num_assistant_tokens = 3
    folder = tmp_path / "draft"
    draft.save_pretrained(folder)
    for file in custom_generate_files():
        (folder / file.path).parent.mkdir(exist_ok=True)
        (folder / file.path).write_bytes(file.read())
    draft = AutoModelForCausalLM.from_pretrained(folder)
    prompts = torch.cat([prompt[:, :5] for prompt in tiny_prompts(tokenizer, 2)])
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 16, "do_sample": False}
    plain = target.generate(prompts, **options)
    options |= {"custom_generate": str(folder), "tokenizer": tokenizer}
    ours = target.generate(prompts, **options, trust_remote_code=True, assistant_model=draft)
    assert ours.tolist() == plain.tolist()
    with pytest.raises(ValueError, match="assistant_model=draft"):
        target.generate(prompts, **options, trust_remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        target.generate(prompts, **options, trust_remote_code=False, assistant_model=draft)


def test_it_is_published_only_when_asked_for(hub: FakeHub, draft_folder: Path):
    """Code that a person did not ask for has no place in a repository, nor has that of an older version."""
    assert not FILES & {file.path for file in push(draft_folder).files}
    upload = push(draft_folder, custom_generate=True)
    assert {file.path for file in upload.files} == PUBLISHED | FILES
    assert hub.repos[ID].files()["custom_generate/requirements.txt"].startswith(b"hf_draftkd>=")
    assert "custom_generate" in upload.card.data.tags
    text = upload.card.render()
    assert f'custom_generate="{ID}",\n    trust_remote_code=True' in text
    assert "It runs `custom_generate/generate.py` of this repository" in text
    again = push(draft_folder)
    assert set(again.deleted) == FILES
    assert "custom_generate" not in again.card.data.tags
    assert "custom_generate/generate.py" not in again.card.render()
