"""The shipped demo pair and the script that makes it."""

import importlib
import json
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from tests.processes import ROOT, run

DEMO = ROOT / "hf_draftkd" / "assets" / "demo"
SPLITS = ("train", "dev", "test")


def rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / f"{split}.jsonl").read_text().splitlines()]


def test_no_function_module_or_prompt_crosses_a_split():
    """A test query that training has seen would flatter every draft."""
    seen: dict[str, set[str]] = {}
    for split in SPLITS:
        prompts = [row["prompt"][0]["content"] for row in rows(split)]
        assert len(set(prompts)) == len(prompts)
        modules, functions = ({row[column] for row in rows(split)} for column in ("module", "function"))
        seen[split] = {("module", name) for name in modules} | {("function", name) for name in functions} | set(prompts)
    assert seen["train"].isdisjoint(seen["dev"])
    assert seen["train"].isdisjoint(seen["test"])
    assert seen["dev"].isdisjoint(seen["test"])


@pytest.mark.parametrize("split", SPLITS)
def test_references_are_calls_of_the_named_function_in_the_one_serialisation(split):
    for row in rows(split):
        answer = json.loads(row["reference"])
        assert json.dumps(answer) == row["reference"]
        assert answer["tool_calls"][0]["function"]["name"] == row["function"]
        assert f"\n{row['function']}(" in row["prompt"][0]["content"]
        assert row["domain"] == "function_calling"


def test_pair_shares_a_tokenizer_and_carries_no_sampling_defaults():
    """Sampling settings in a generation config would leak into every number measured with the pair."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DEMO / "target" / name).read_bytes() == (DEMO / "draft" / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "target")
    for name in ("target", "draft"):
        generation = GenerationConfig.from_pretrained(DEMO / name)
        assert not generation.do_sample
        assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert generation.temperature in (None, 1.0)
        assert generation.top_p in (None, 1.0)
        assert generation.repetition_penalty in (None, 1.0)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_template_marks_answer_and_its_end_for_assistant_only_loss():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "target")
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "a<|end|>"
    opening = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded["input_ids"][: len(opening)] == opening


def test_the_card_is_what_the_script_makes_of_its_provenance(monkeypatch):
    """A card edited by hand, whose words are lost when it is written again."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    card = importlib.import_module("demo_pair.card")
    provenance = json.loads((DEMO / "provenance.json").read_text(encoding="utf-8"))
    assert card.render_card(provenance) == (DEMO / "README.md").read_text(encoding="utf-8")


def test_pair_fits_into_the_package():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 20e6


def test_every_stage_runs_at_toy_size(tmp_path):
    run(ROOT / "examples" / "pretrain_demo_pair.py", "--smoke", "--threads", 1, "--work_dir", tmp_path, cwd=ROOT)
    provenance = json.loads((tmp_path / "assets" / "provenance.json").read_text())
    assert provenance["figures"]["calls"]["test"]["queries"] == 8
    assert (tmp_path / "assets" / "target" / "model.safetensors").exists()
    assert "--smoke" in (tmp_path / "assets" / "README.md").read_text()
