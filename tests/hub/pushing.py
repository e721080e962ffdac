"""What a push sends, for tests."""

from pathlib import Path

from hf_draftkd.hub.push import push_draft

ID = "me/draft"
PUBLISHED = {
    "README.md",
    "report.json",
    "provenance.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "generation_config.json",
    "plots/block_efficiency.png",
}


def push(folder: Path, **options):
    return push_draft(folder, options.pop("repo_id", ID), **({"license": "mit"} | options))
