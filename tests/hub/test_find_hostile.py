"""One stranger's repository must not keep everybody else from finding drafts."""

from typing import Any

import pytest

from hf_draftkd.cli import find as find_command
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.hub.find import find_drafts
from tests.hub.fake_hub import FakeHub
from tests.hub.test_find import TARGET, about, add_draft


@pytest.fixture
def sha(hub: FakeHub) -> str:
    """The target is on the Hub; returns its commit."""
    return hub.add(TARGET, {"README.md": "# big"}).refs["main"]


def index(metrics: list[dict[str, Any]], config: Any = None) -> list[dict[str, Any]]:
    dataset = {"type": "prompts", "name": "n"} | ({"config": config} if config is not None else {})
    return [{"name": "x", "results": [{"task": {"type": "t"}, "dataset": dataset, "metrics": metrics}]}]


def metric(kind: str, value: Any, **args: Any) -> dict[str, Any]:
    return {"type": kind, "value": value, "args": DecodingSetting().to_dict() | args}


GOOD = metric("acceptance_rate", 0.9)
ANSWERS = {
    "an index that is a text": {"model-index": "nonsense"},
    "an index without results": {"model-index": [{}]},
    "results that are a text": {"model-index": [{"name": 3, "results": "x"}]},
    "metrics that are a number": {"model-index": index(7)},  # type: ignore[arg-type]
    "a value that is a text": {"model-index": index([metric("acceptance_rate", "<script>")])},
    "a temperature that is a list": {"model-index": index([metric("acceptance_rate", 0.9, temperature=[1])])},
    "arguments that are a text": {"model-index": index([{"type": "acceptance_rate", "value": 0.9, "args": "x"}])},
    "a number beyond every float": {"model-index": index([metric("acceptance_rate", 10**400)])},
    "a temperature beyond every float": {"model-index": index([metric("acceptance_rate", 0.9, temperature=10**400)])},
    "a data set's configuration that is a list": {"model-index": index([GOOD], config=["a"])},
    "a cost that divides by zero": {
        "safetensors": None,
        "model-index": index(
            [GOOD, metric("block_efficiency", 2.0, num_assistant_tokens=5), metric("relative_cost", -0.2)]
        ),
    },
    "a model of 10^400 parameters": {
        "safetensors": {"parameters": {"F32": 10**400}, "total": 10**400},
        "model-index": index([GOOD, metric("block_efficiency", 2.0, num_assistant_tokens=5)]),
    },
    "an argument of the metadata's own class": {"cardData": {"ignore_metadata_errors": True, "license": "mit"}},
    "tags that are a number": {"cardData": {"tags": 3}},
    "half a character": {
        "cardData": {"license": "\ud800"},
        "tags": ["draft-model", f"draft-for:{TARGET}", "license:\ud800"],
    },
}


def test_others_are_found_nevertheless(hub: FakeHub, sha: str, capsys):
    """Catches a listing, a table or a JSON that ends in a traceback over what a stranger recorded."""
    add_draft(hub, "a/good", about(sha, alpha=0.5, tau=2.0))
    hostile = {f"b/hostile-{number}": answer for number, answer in enumerate(ANSWERS.values())}
    for name in hostile:
        add_draft(hub, name, None)
    hub.overrides |= hostile
    assert {draft.repo_id for draft in find_drafts(TARGET)} == {"a/good", *hostile}
    for options in ([], ["--json"]):
        assert find_command.run([TARGET, *options]) == 0
        capsys.readouterr().out.encode()


IMPOSSIBLE = [
    metric("acceptance_rate", float("inf")),
    metric("acceptance_rate", 1.5),
    metric("acceptance_rate", -0.1),
    metric("block_efficiency", 1e9, num_assistant_tokens=5),
    metric("block_efficiency", 0.2, num_assistant_tokens=5),
    metric("speedup", -2.0),
]


def test_a_figure_that_nothing_can_have_measured_is_none(hub: FakeHub, sha: str):
    """Catches a made-up number that puts its draft on top of the list."""
    add_draft(hub, "a/good", about(sha, alpha=0.5, tau=2.0))
    for number, made_up in enumerate(IMPOSSIBLE):
        add_draft(hub, f"b/hostile-{number}", None)
        hub.overrides[f"b/hostile-{number}"] = {"model-index": index([made_up])}
    good, *hostile = find_drafts(TARGET)
    assert good.repo_id == "a/good"
    assert len(hostile) == len(IMPOSSIBLE)
    for draft in hostile:
        assert draft.settings == (), draft.repo_id
        assert draft.remarks == ("no metrics recorded",)


def test_a_target_whose_metadata_cannot_be_read_has_drafts_nevertheless(hub: FakeHub, sha: str):
    add_draft(hub, "a/good", about(sha, alpha=0.5, tau=2.0))
    hub.overrides[TARGET] = {"cardData": {"tags": 3}}
    [draft] = find_drafts(TARGET)
    assert draft.repo_id == "a/good"
    assert draft.remarks == ()
