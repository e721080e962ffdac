"""Finding drafts: the right ones, in the right order, and nothing believed that a stranger made up."""

import io
import json
import re

import pytest
from rich.console import Console

from hf_draftkd.cli import find as find_command
from hf_draftkd.cli.errors import UsageError
from hf_draftkd.cli.main import dispatch
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.hub.find import FoundDraft, RecordedSetting, find_drafts
from hf_draftkd.hub.model_card import DraftModelCard
from tests.hub import samples
from tests.hub.fake_hub import FakeHub

TARGET = samples.TARGET


def add_draft(hub: FakeHub, repo_id: str, report: dict | None, *, target: str = TARGET, parameters: int = 4, **options):
    """A draft's repository: its card, its report, and weights of so many parameters."""
    training = samples.training(target=target, target_revision=None)
    card = DraftModelCard.from_report(report, training=training, name=repo_id, license="mit")
    header = json.dumps({"w": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 4 * parameters]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + b"\0" * 4 * parameters
    files: dict = {"README.md": card.render(), "model.safetensors": weights}
    if report is not None:
        files["report.json"] = json.dumps(report)
    return hub.add(repo_id, files, **options)


@pytest.fixture
def target_sha(hub: FakeHub) -> str:
    """The target is on the Hub, is based on `org/base`, and this is its latest commit."""
    hub.add("org/base", {"README.md": "---\nlicense: mit\n---\n"})
    header = b'{"w":{"dtype":"F32","shape":[100],"data_offsets":[0,400]}}'
    weights = len(header).to_bytes(8, "little") + header + b"\0" * 400
    repo = hub.add(TARGET, {"README.md": "---\nbase_model: org/base\n---\n", "model.safetensors": weights})
    return repo.refs["main"]


def about(sha: str, *, alpha: float, tau: float, target: str = TARGET) -> dict:
    settings = [samples.setting(0.0, "greedy_draft", alpha, tau - 0.5)]
    info = {"name": target, "revision": sha, "num_parameters": 100}
    return samples.report(target=info, settings=settings, baseline=None, paired_difference=None)


def test_best_first_with_everything_recorded(hub: FakeHub, target_sha: str):
    """Catches an order by download count, and metrics lost on the way."""
    add_draft(hub, "a/popular", about(target_sha, alpha=0.4, tau=1.6), downloads=9000)
    add_draft(hub, "b/good", about(target_sha, alpha=0.7, tau=2.5), downloads=3)
    # More tokens per call, but half the size of the target: in the end slower.
    add_draft(hub, "c/large", about(target_sha, alpha=0.8, tau=3.0), parameters=50)
    found = find_drafts(TARGET)
    assert [draft.repo_id for draft in found] == ["b/good", "a/popular", "c/large"]
    best = found[0]
    assert best.acceptance_rate == 0.7
    assert best.block_efficiency == 2.5
    assert best.num_parameters == 4
    assert best.relative_cost == 0.1
    assert best.license == "mit"
    assert best.downloads == 3
    assert best.revision == hub.repos["b/good"].refs["main"]
    assert best.remarks == ()
    assert best.settings[0].num_assistant_tokens == 5


def test_settings_that_differ_in_one_value_stay_apart(hub: FakeHub, target_sha: str):
    """Catches metrics with a repetition penalty that overwrite those without, and lists that name no such value."""
    report = about(target_sha, alpha=0.4, tau=1.6)
    for temperature, change in (
        (0.0, {"repetition_penalty": 1.2}),
        (1.0, {}),
        (1.0, {"top_p": 0.9}),
        (1.0, {"top_k": 5}),
    ):
        entry = samples.setting(temperature, "greedy_draft", 0.7, 2.0)
        report["settings"].append(entry | {"decoding": samples.decoding(temperature, **change)})
    report["groups"] = {"maths": [samples.setting(0.0, "greedy_draft", 0.7, 2.0, num_texts=9)], "law": []}
    add_draft(hub, "a/draft", report)
    (found,) = find_drafts(TARGET)
    assert [setting.acceptance_rate for setting in found.settings] == [0.4, 0.7, 0.7, 0.7, 0.7, 0.7]
    assert [(setting["domain"], *setting["decoding"].values()) for setting in found.to_dict()["settings"]] == [
        ("function calling", 0.0, 1.0, 0, 1.0),
        ("function calling", 0.0, 1.0, 0, 1.2),
        ("function calling", 1.0, 1.0, 0, 1.0),
        ("function calling", 1.0, 0.9, 0, 1.0),
        ("function calling", 1.0, 1.0, 5, 1.0),
        ("maths", 0.0, 1.0, 0, 1.0),
    ]


def test_speedups_of_every_way_stay_apart(hub: FakeHub, target_sha: str, capsys, monkeypatch):
    """Catches one speed-up that stands for all ways of decoding: that of the way which the card lists last."""
    settings = samples.report()["settings"][:1]
    runs = {"assistant_model=": settings[0]["assisted"], "SpeculativeDecoding": settings[0]["speculative"]}
    settings[0]["parallel"] = {
        "num_tokens": 5,
        "acceptance_by_depth": [],
        "block_efficiency": {},
        "speculative": runs["SpeculativeDecoding"] | {"speedup": samples.estimate(2.4, 0.1)},
    }
    add_draft(hub, "a/draft", samples.report(settings=settings, baseline=None, paired_difference=None))
    (recorded,) = find_drafts(TARGET)[0].settings
    assert (recorded.speedup, recorded.speculative_speedup, recorded.parallel_speedup) == (1.85, 2.15, 2.4)
    assert "H100" in recorded.hardware
    monkeypatch.setenv("COLUMNS", "300")
    assert find_command.run([TARGET]) == 0
    speeds = "1.85 times by assistant_model=; 2.15 times by SpeculativeDecoding; 2.40 times by SpeculativeDecoding in "
    assert speeds in capsys.readouterr().out


def test_a_way_that_is_not_known_is_no_other_ways(hub: FakeHub, target_sha: str):
    """Catches a later version's way of decoding read as `assistant_model=`, as what names no way rightly is."""
    add_draft(hub, "a/draft", samples.report(baseline=None, paired_difference=None))
    files = hub.repos["a/draft"].files()
    card = files["README.md"].decode().replace("way: assistant_model=", "way: another")
    card = re.sub(r"\n +way: SpeculativeDecoding", "", card)
    hub.repos["a/draft"].commit(files | {"README.md": card.encode()}, "edit")
    recorded = find_drafts(TARGET)[0].settings[0]
    assert (recorded.speedup, recorded.speculative_speedup) == (2.15, None)


def test_only_drafts_of_this_target(hub: FakeHub, target_sha: str):
    add_draft(hub, "a/mine", about(target_sha, alpha=0.4, tau=1.6))
    add_draft(hub, "b/others", about("0" * 40, alpha=0.9, tau=3.0, target="org/other"), target="org/other")
    hub.add("c/no-draft", {"README.md": f"---\ntags: ['draft-for:{TARGET}']\n---\n"})
    assert [draft.repo_id for draft in find_drafts(TARGET)] == ["a/mine"]


def test_every_page_is_read(hub: FakeHub, target_sha: str):
    """Catches a listing that stops after the first page."""
    for index in range(7):
        add_draft(hub, f"a/draft-{index}", about(target_sha, alpha=0.1 * index, tau=1.0 + index))
    assert [draft.repo_id for draft in find_drafts(TARGET)] == [f"a/draft-{index}" for index in reversed(range(7))]
    # The Hub lists them in an order of its own.
    assert [draft.repo_id for draft in find_drafts(TARGET, limit=3)] == ["a/draft-6", "a/draft-5", "a/draft-4"]


def test_missing_figures_and_other_revisions_are_said(hub: FakeHub, target_sha: str):
    add_draft(hub, "a/current", about(target_sha, alpha=0.3, tau=1.2))
    add_draft(hub, "b/older", about("0" * 40, alpha=0.9, tau=3.0))
    add_draft(hub, "c/silent", None)
    found = find_drafts(TARGET)
    assert [(draft.repo_id, draft.remarks) for draft in found] == [
        ("a/current", ()),
        ("b/older", ("metrics were measured on another revision of the target",)),
        ("c/silent", ("no metrics recorded",)),
    ]
    assert found[2].acceptance_rate is None
    # Asked about that older revision, the other draft is the one that fits.
    assert find_drafts(TARGET, revision="0" * 40)[0].repo_id == "b/older"


def test_a_revision_means_its_commit(hub: FakeHub, target_sha: str):
    """Catches metrics of the very commit that are called another revision's, since its name differs."""
    add_draft(hub, "a/older", about("0" * 40, alpha=0.9, tau=3.0))
    add_draft(hub, "b/current", about(target_sha, alpha=0.3, tau=1.2))
    other = ("metrics were measured on another revision of the target",)
    for revision in ("main", target_sha, target_sha[:8]):
        found = find_drafts(TARGET, revision=revision)
        assert [(draft.repo_id, draft.remarks) for draft in found] == [("b/current", ()), ("a/older", other)], revision
    for revision in ("v9", "0" * 6):
        with pytest.raises(ValueError, match=f"{TARGET} has no revision '{revision}'"):
            find_drafts(TARGET, revision=revision)


def test_a_branch_of_a_target_that_cannot_be_seen_is_compared_with_nothing(hub: FakeHub):
    add_draft(hub, "a/draft", about("0" * 40, alpha=0.9, tau=3.0))
    other = ("metrics were measured on another revision of the target",)
    found = {revision: find_drafts(TARGET, revision=revision)[0].remarks for revision in ("main", "0" * 9, "1" * 9)}
    assert found == {"main": (), "0" * 9: (), "1" * 9: other}


def test_drafts_of_the_base_model_come_last_and_say_so(hub: FakeHub, target_sha: str):
    base_sha = hub.repos["org/base"].refs["main"]
    add_draft(hub, "a/for-base", about(base_sha, alpha=0.95, tau=4.0, target="org/base"), target="org/base")
    add_draft(hub, "b/for-target", about(target_sha, alpha=0.2, tau=1.1))
    found = find_drafts(TARGET)
    assert [draft.repo_id for draft in found] == ["b/for-target", "a/for-base"]
    assert found[1].remarks == (f"made for org/base, which {TARGET} derives from",)
    hub.requests.clear()
    assert [draft.repo_id for draft in find_drafts(TARGET, include_base_models=False)] == ["b/for-target"]
    assert not [path for _, path in hub.requests if "org/base" in path]


def test_a_circle_of_base_models_ends(hub: FakeHub):
    hub.add("a/x", {"README.md": "---\nbase_model: a/y\n---\n"})
    hub.add("a/y", {"README.md": "---\nbase_model: a/x\n---\n"})
    assert find_drafts("a/x") == []


def test_a_target_that_is_not_on_the_hub_can_have_drafts(hub: FakeHub):
    add_draft(hub, "a/draft", about("0" * 40, alpha=0.5, tau=2.0))
    [draft] = find_drafts(TARGET)
    assert draft.acceptance_rate == 0.5


def test_private_drafts_are_seen_by_their_owner_only(hub: FakeHub, target_sha: str, monkeypatch):
    add_draft(hub, "me/secret", about(target_sha, alpha=0.5, tau=2.0), private=True)
    assert [draft.private for draft in find_drafts(TARGET)] == [True]
    monkeypatch.delenv("HF_TOKEN")
    assert find_drafts(TARGET) == []


def test_the_hub_fails(hub: FakeHub):
    hub.fail("GET", "/api/models", times=20, status=500)
    with pytest.raises(ConnectionError, match="failed \\(500\\)"):
        find_drafts(TARGET)


def test_the_network_fails(hub: FakeHub):
    hub.fail("GET", "/api/models", times=20, cut=True)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        find_drafts(TARGET)


@pytest.mark.parametrize("target", ["/home/me/target", "./target", "a/b/c", "", "x: [y"])
def test_a_path_is_no_target_to_ask_the_hub_about(target):
    with pytest.raises(ValueError, match="Hub id"):
        find_drafts(target)


class TestCommand:
    def test_table_and_json(self, hub: FakeHub, target_sha: str, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        add_draft(hub, "a/draft", about(target_sha, alpha=0.625, tau=2.25))
        add_draft(hub, "b/silent", None)
        assert find_command.run([TARGET]) == 0
        text = capsys.readouterr().out
        for expected in ("a/draft", "0.625", "2.25", "greedy", "mit", "no metrics recorded"):
            assert expected in text
        assert find_command.run([TARGET, "--json"]) == 0
        plain = json.loads(capsys.readouterr().out)
        assert [draft["repo_id"] for draft in plain] == ["a/draft", "b/silent"]
        assert plain[0]["settings"][0]["acceptance_rate"] == 0.625
        assert "relative_cost" not in plain[1]

    def test_no_figure_is_cut_on_a_narrow_terminal(self):
        """Catches `14,8…`: a number without its end is a false one."""
        decoding = DecodingSetting(temperature=0.7)
        measured = {"acceptance_rate": 0.625, "block_efficiency": 12.25, "num_assistant_tokens": 16}
        name = "an-organisation-with-a-long-name/Qwen2.5-0.5B-Instruct-draft-for-72B"
        known = {"num_parameters": 14_830_000_000, "relative_cost": 0.125, "license": "apache-2.0"}
        remarks = ("metrics were measured on another revision of the target",)
        draft = FoundDraft(
            name,
            None,
            TARGET,
            (RecordedSetting(decoding, "exact_match", **measured),),
            **known,
            downloads=1_234_567,
            remarks=remarks,
        )
        console = Console(file=io.StringIO(), width=80)
        console.print(find_command.table([draft], TARGET))
        text = console.file.getvalue()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 80
        for part in ("0.625", "12.25", "16", "T 0.7", "14.8B", "1.23M", "apache-2.0", "cost 0.125"):
            assert re.search(rf"(?<!\S){re.escape(part)}(?![^\s;])", text), part
        # What is folded is whole: the first column, put together again.
        end = next(line.index("accept-") for line in text.splitlines() if "accept-" in line)
        left = "".join(line[:end].strip() for line in text.splitlines())
        assert name in left

    def test_counts_are_short(self):
        counts = {None: "-", 0: "0", 999: "999", 1000: "1k", 999_499: "999k", 999_500: "1M", 10**9: "1B", 10**12: "1T"}
        assert {count: find_command._short(count) for count in counts} == counts

    def test_none_found_is_not_an_error(self, hub: FakeHub, target_sha: str, capsys):
        assert find_command.run([TARGET]) == 0
        assert "No draft on the Hub is tagged" in capsys.readouterr().out

    def test_exit_codes(self, hub: FakeHub, capsys):
        with pytest.raises(UsageError, match="Hub id"):
            find_command.run(["./here"])
        with pytest.raises(UsageError, match="missing: --target_model"):
            find_command.run([])
        hub.fail("GET", "/api/models", times=20, status=500)
        assert dispatch(["find", TARGET]) == 1
        assert "failed (500)" in capsys.readouterr().err
