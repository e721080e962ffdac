"""The claims: their harness runs each cell once, their verdicts follow from the numbers, their scripts run."""

import copy
import importlib
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.cli.run import ROOT
from tests.processes import python
from tests.tiny import tiny_llama

CLAIMS = ROOT / "examples" / "claims"


@pytest.fixture
def claims(monkeypatch):
    """The modules of the folder, as its scripts import each other."""
    monkeypatch.syspath_prepend(str(CLAIMS))
    monkeypatch.syspath_prepend(str(CLAIMS.parent))
    names = ("harness", "recipes", "scoring", "verdicts", "b8_own_loss", "run", "render", "beyond")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Texts and drafts of the smallest size, which the tests share as the claims do."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def smoke(work, small_pair, tmp_path):
    """Options of a short run whose results are the test's own."""
    where = ["--pair", str(small_pair), "--work_dir", str(work), "--results_dir", str(tmp_path / "results")]
    return ["--sizes", "smoke", *where]


def table(tokens, acceptance):
    return {"tokens": tokens, "acceptance": acceptance, "calls": {"5": [1.0] * len(tokens)}}


def result(tokens, acceptance, epochs=3):
    return {"cell": {"what": {"epochs": epochs}}, "scores": {"test": {"greedy": table(tokens, acceptance)}}}


# Verdicts


@pytest.mark.parametrize(
    ("low", "high", "claimed", "falls", "expected"),
    [
        (0.01, 0.03, (0.02, 0.10), False, "reproduced"),
        (0.001, 0.01, (0.02, 0.10), False, "refuted (a smaller effect)"),
        (0.2, 0.3, (0.02, 0.10), False, "reproduced, larger"),
        (-0.03, -0.01, (0.02, 0.10), False, "refuted"),
        (-0.01, 0.01, (0.02, 0.10), False, "refuted (no such effect)"),
        (-0.01, 0.03, (0.02, 0.10), False, "undecided"),
        (-0.01, 0.01, (0.0, None), False, "undecided"),
        (-0.3, -0.2, (0.1, 0.4), True, "reproduced"),
        (0.1, 0.2, (0.1, 0.4), True, "refuted"),
    ],
)
def test_a_verdict_follows_from_the_interval(claims, low, high, claimed, falls, expected):
    """A direction turned round, or an effect of no size that is called reproduced."""
    found = claims.verdicts.Estimate((low + high) / 2, low, high, seeds=3, prompts=200)
    assert claims.verdicts.verdict(found, claims.verdicts.Claimed(*claimed), falls=falls) == expected


@pytest.mark.parametrize(("seeds", "prompts"), [(2, 200), (3, 149)])
def test_too_little_decides_nothing(claims, seeds, prompts):
    """A winner among few prompts: a public replication got opposite ones from 32 and from 164."""
    found = claims.verdicts.Estimate(1.0, 0.9, 1.1, seeds, prompts)
    assert claims.verdicts.verdict(found) == f"undecided ({seeds} of 3 seeds, {prompts} prompts)"


def test_an_interval_covers_what_resampling_by_hand_covers(claims):
    """Prompts or seeds resampled apart for each arm, or ratios averaged instead of counts."""
    generator = np.random.default_rng(1)
    ours, theirs = (generator.uniform(1, 2, (2, 3, 40)) * np.array([gain, 1])[:, None, None] for gain in (1.1, 1.0))
    found = claims.verdicts.bootstrap(
        [ours, theirs], lambda a, b: claims.verdicts.ratio_of_sums(a) - claims.verdicts.ratio_of_sums(b)
    )
    drawn = []
    for _ in range(4000):
        seeds, prompts = generator.integers(3, size=3), generator.integers(40, size=40)
        sums = [arm[:, seeds][:, :, prompts].sum((1, 2)) for arm in (ours, theirs)]
        drawn.append(sums[0][0] / sums[0][1] - sums[1][0] / sums[1][1])
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found.value == pytest.approx(ours[0].sum() / ours[1].sum() - theirs[0].sum() / theirs[1].sum())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_arms_are_compared_over_the_seeds_that_both_have(claims):
    """The third seed of one arm against nothing, or an untrained draft that costs all seeds but one."""
    one, two = [result([4, 4], [1.0, 2.0])] * 3, [result([4, 4], [2.0, 2.0])] * 2
    untrained = [result([4, 4], [1.0, 1.0], epochs=0)]
    comparison = claims.verdicts.Comparison("", "a", "b", relative=False)
    assert claims.verdicts.effect(comparison, {"a": two, "b": one}, "greedy").seeds == 2
    found = claims.verdicts.effect(comparison, {"a": one, "b": untrained}, "greedy")
    assert (found.seeds, found.value) == (3, pytest.approx(1 / 8))


def test_rank_correlation_is_spearmans(claims):
    """Ranks of another axis: a correlation of prompts instead of states."""
    acceptance = np.array([[0.1, 0.4], [0.2, 0.3], [0.3, 0.1]])
    found = claims.b8_own_loss.rank_correlation(acceptance, np.array([3.0, 2.0, 1.0]))
    assert found == pytest.approx([-1.0, 1.0])


# Harness


@dataclass
class Counted:
    """An experiment that says how often it ran."""

    runs: list[int]
    name: str = "counted"
    needs_data: bool = False
    predicted_seconds: float = 7.0

    def measure(self, lab: Any, seed: int) -> dict[str, Any]:
        self.runs.append(seed)
        if seed == 1 and len(self.runs) == 2:
            raise KeyboardInterrupt
        return {"figure": seed}


def claim_of(claims, what):
    return claims.harness.Claim("X", "says", "source", {"arm": claims.harness.Arm(what, ())})


def test_a_killed_run_resumes_and_repeats_nothing(claims, smoke, tmp_path, capsys):
    """Hours of cells that are run again, or half a file that counts as done."""
    what = Counted([])
    claim = claim_of(claims, what)
    with pytest.raises(KeyboardInterrupt):
        claims.harness.main([claim], smoke)
    claims.harness.main([claim], [*smoke, "--list"])
    assert "X: 1 cells done, 2 left, about 0 s" in capsys.readouterr().out
    claims.harness.main([claim], smoke)
    claims.harness.main([claim], smoke)
    assert what.runs == [0, 1, 1, 2]
    (folder,) = (tmp_path / "results").iterdir()
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["counted_seed0.json", "counted_seed1.json", "counted_seed2.json"]
    stored = json.loads((folder / "counted_seed2.json").read_text())
    assert stored["figure"] == 2
    assert {"made", "versions", "processor", "threads"} <= stored["provenance"].keys()


def test_results_of_another_pair_or_script_are_not_mixed_in(claims, smoke, tmp_path):
    """Figures of the pair before, or of another number of steps, in the table of today's."""
    claim = claim_of(claims, Counted([]))
    claims.harness.main([claim], [*smoke, "--seeds", "1"])
    (folder,) = (tmp_path / "results").iterdir()
    results = claims.harness.Results(
        tmp_path / "results", {"target": "0" * 64, "draft": "1" * 64}, claims.recipes.SIZES["smoke"]
    )
    cell = claims.harness.Cell(claim.arms["arm"].what, None, 0)
    assert results.get(cell) is None
    path = folder / "counted_seed0.json"
    stored = json.loads(path.read_text())
    stored["sizes"]["test"] = 200
    path.write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match="another sizes than the scripts say now"):
        claims.harness.main([claim], [*smoke, "--seeds", "1"])


def test_nothing_is_started_after_the_budget(claims, smoke):
    """A night's budget that is taken for advice."""
    what = Counted([])
    claims.harness.main([claim_of(claims, what)], [*smoke, "--budget_seconds", "-1"])
    assert what.runs == []


def test_the_best_rate_by_the_dev_queries_gets_the_other_seeds(claims, tmp_path):
    """A rate chosen on the test queries, or seeds spent on a rate that lost."""
    arm = claims.harness.Arm(claims.recipes.recipe("r"), (1e-3, 1e-4))
    claim = claims.harness.Claim("X", "says", "source", {"arm": arm})
    results = claims.harness.Results(tmp_path, {"target": "0" * 64, "draft": "1" * 64}, claims.recipes.SIZES["smoke"])

    def store(rate, dev, test):
        tables = {"dev": {"greedy": table([4], [dev])}, "test": {"greedy": table([4], [test])}}
        results.put(claims.harness.Cell(arm.what, rate, 0), {"seconds": 1.0, "scores": tables})

    names = lambda: [cell.name for cell in claims.harness.cells([claim], results, 2)]  # noqa: E731
    store(1e-3, dev=3.0, test=1.0)
    assert names() == ["r_rate0.001_seed0", "r_rate0.0001_seed0"]
    store(1e-4, dev=2.0, test=4.0)
    assert names() == ["r_rate0.001_seed0", "r_rate0.0001_seed0", "r_rate0.001_seed1"]


def test_lower_rates_are_tried_by_every_arm_that_has_a_choice(claims, tmp_path):
    """One arm at its best of four rates against another at its best of three, or an arm's one rate replaced."""
    recipe, arm = claims.recipes.recipe, claims.harness.Arm
    arms = {"chosen": arm(recipe("r"), (1e-3, 1e-4)), "given": arm(recipe("s"), (1e-3,)), "left": arm(recipe("t"), ())}
    claim = claims.harness.Claim("X", "says", "source", arms)
    pair, sizes = {"target": "0" * 64, "draft": "1" * 64}, claims.recipes.SIZES["smoke"]
    results = claims.harness.Results(tmp_path, pair, sizes, lower_rates=(1e-5,))
    first = ["r_rate0.001_seed0", "r_rate0.0001_seed0", "r_rate1e-05_seed0", "s_rate0.001_seed0", "t_seed0"]
    assert [cell.name for cell in claims.harness.cells([claim], results, 1)] == first
    assert "the best of 0.003, 0.0015, 0.0006, 1e-05, or" in claims.render.page(results, [], claims.render.DEMO)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sizes", "smoke"], "give a --results_dir"),
        (["--only", "A9"], "no claim is called 'A9'"),
        (["--mask_token", "<nothing>"], "has no token '<nothing>'"),
    ],
)
def test_what_cannot_work_is_said(options, said, tmp_path):
    """Toy results among the real ones, a typo that runs nothing, or a `KeyError` after the hours before PARD."""
    done = python(CLAIMS / "run.py", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr


# Scripts


def test_kept_live_and_written_cells_run_and_are_rendered(claims, smoke, small_pair, tmp_path):
    """A recipe that no longer trains, or a page that does not find its results."""
    recipe, arm = claims.recipes.recipe, claims.harness.Arm
    start = arm(claims.recipes.TUNED_DRAFT, (), is_seeded=False)
    kept = arm(recipe("kept", epochs=0.5, keep_at=(0.5, 1.0)), (1e-3, 1e-4))
    live = arm(recipe("live", epochs=0.25, loss="unweighted_rewards"), (1e-3,))
    written = arm(recipe("written", epochs=0.25, lmbda=1.0), (1e-3,))
    parallel = arm(recipe("parallel", epochs=0.25, parallel_tokens=8), (1e-3,))
    arms = {"start": start, "kept": kept, "live": live, "written": written, "PARD": parallel}
    comparison = claims.verdicts.Comparison("kept against start", "kept", "start")
    claim = claims.harness.Claim("X", "says", "source", arms, (comparison,))
    claims.harness.main([claim], [*smoke, "--seeds", "1"])
    weights = claims.render.pair_weights(small_pair)
    results = claims.harness.Results(tmp_path / "results", weights, claims.recipes.SIZES["smoke"])
    assert len(list(results.folder.glob("*.json"))) == 1 + 2 + 1 + 1 + 1
    states = results.of_arm(kept, 1)[0]["states"]
    assert [state["step"] for state in states] == [1, 2]
    page = claims.render.page(results, claims.render.judged(results, [claim], 3), small_pair)
    (row,) = (line for line in page.splitlines() if line.startswith("| X | kept against start | higher | greedy: "))
    assert "<br>T=1: " in row
    assert "undecided (1 of 3 seeds, 2 prompts)" in page
    assert "6 cells, made" in page
    assert claims.beyond.speed("PARD", results.of_arm(parallel, 1), "T=1")[0] > 0
    unrun = claims.harness.Claim("Y", "says more", "source", {"arm": arm(recipe("never"))})
    found = claims.render.judged(results, [unrun], 3)
    assert "| Y | says more | | | not run yet |" in claims.render.page(results, found, small_pair)
    begin, end = claims.render.MARKS
    shown = claims.render.with_headlines(f"before\n{begin}what was there\n{end}behind\n", {"here": found})
    assert shown.startswith(f"before\n{begin}| claim |")
    assert shown.endswith(f"| not run yet |\n{end}behind\n")
    assert "what was there" not in shown


def test_headlines_of_two_pairs_stand_in_one_row(claims):
    """A second pair's effect beside another comparison, or a verdict of one temperature given for both."""
    found = claims.verdicts.Finding
    claim = claims.harness.Claim("X", "says", "source", {})
    ours = [found("a", "+1%", "+2%", "reproduced", "greedy"), found("a", "+1%", "+3%", "reproduced", "T=1")]
    theirs = [
        found("b", "+1%", "+9%", "reproduced", "greedy"),
        found("a", "+1%", "-2%", "refuted", "greedy"),
        found("a", "+1%", "+4%", "reproduced", "T=1"),
    ]
    more = [found("c", "", "+8%", "reproduced"), *ours]  # a comparison that the other pair does not have
    pairs = {"P": [(claim, {}, more), (claim, {}, ours)], "Q": [(claim, {}, theirs), (claim, {}, [])]}
    head, rule, both, one = claims.render.headlines(pairs)
    assert head == "| claim | compared | paper | P | Q |"
    assert rule == "|---|---|---|---|---|"
    left = "| X | a | +1% | greedy: +2%<br>T=1: +3%<br>reproduced | "
    assert both == left + "greedy: -2%, refuted<br>T=1: +4%, reproduced |"
    assert one == left + " |"


def test_claims_about_seconds_run(claims, smoke, tmp_path):
    """Decoding in several ways, and quality of what was decoded."""
    wanted = [claim for claim in claims.run.CLAIMS if claim.name in ("B4", "B6", "B7", "Vocabulary")]
    claims.harness.main(wanted, [*smoke, "--seeds", "1"])
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/*.json")}
    assert found.keys() == {"speed_gamma7_seed0", "lenience_seed0", "chain_seed0", "vocabulary_list_seed0"}
    for claim in wanted:
        arms = {label: [found[f"{arm.what.name}_seed0"]] for label, arm in claim.arms.items()}
        assert claim.findings(arms)
        assert claim.table(arms) or claim.name == "Vocabulary"


def test_a_draft_with_a_list_is_scored_as_proposing_it(claims):
    """The columns of one draft given to another, or a list that is left aside."""
    target, listed, whole = tiny_llama(seed=0), tiny_llama(seed=1), tiny_llama(seed=2)
    rows = Dataset.from_dict({"prompt_ids": [[1, 2]] * 2, "completion_ids": [[3, 4, 5]] * 2, "temperature": [0.0, 1.0]})
    ids = list(range(0, 40, 2))
    others = sorted(set(range(listed.config.vocab_size)) - set(ids))
    scored = claims.scoring.score_drafts
    masked = copy.deepcopy(listed)
    masked.lm_head.register_forward_hook(
        lambda head, _, logits: logits.index_fill(-1, torch.tensor(others), -torch.inf)
    )
    (expected,), (without,) = scored(target, [masked], rows), scored(target, [whole], rows)
    assert expected != scored(target, [listed], rows)[0]
    listed.generation_config.draft_vocabulary = ids
    assert scored(target, [whole, listed], rows) == [without, expected]
    assert scored(target, [listed, whole], rows) == [expected, without]


def test_a_draft_with_a_list_has_its_own_loss_on_the_tokens_that_it_lists(claims):
    """5.6 nats a token of SmolLM2's draft, most of them of tokens that it never learned."""
    draft, prompt, answer, ids = tiny_llama(), [1, 2], [4, 5, 8], list(range(0, 40, 2))
    lab = SimpleNamespace(right_answers={"prompt_ids": [prompt], "completion_ids": [answer]})
    logits = draft(input_ids=torch.tensor([prompt + answer])).logits[0].detach().double()
    of_answer = {token: logits[len(prompt) - 1 + place] for place, token in enumerate(answer)}
    whole = sum(float(row.logsumexp(-1) - row[token]) for token, row in of_answer.items())
    assert claims.scoring.own_loss(lab, draft) == {"nats": pytest.approx(whole, abs=1e-3), "tokens": 3}
    draft.generation_config.draft_vocabulary = ids
    among_listed = sum(float(of_answer[token][ids].logsumexp(-1) - of_answer[token][token]) for token in (4, 8))
    assert claims.scoring.own_loss(lab, draft) == {"nats": pytest.approx(among_listed, abs=1e-3), "tokens": 2}


def test_a_target_drifts_on_public_prompts(claims, smoke, tmp_path):
    """Rows read as another file has them, or both states of the target scored on one text."""
    data = tmp_path / "data"
    data.mkdir()
    rows = {
        "gsm8k_train": {"question": "1 + 1?", "answer": "2"},
        "gsm8k_test": {"question": "2 + 2?", "answer": "4"},
        "chinese_instructions": {"prompt": "问", "answer": "答"},
        "function_calls": {
            "messages": [{"role": "user", "content": "add"}],
            "functions": [{"name": "add", "description": "adds"}],
            "ground_truth": [{"add": {"a": [1]}}],
        },
    }
    for name, row in rows.items():
        (data / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8)
    (drift,) = (claim for claim in claims.run.CLAIMS if claim.name == "A1")
    claims.harness.main([drift], [*smoke, "--seeds", "1", "--data_dir", str(data)])
    found = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/drift_*.json")]
    assert len(found) == 3
    assert all(each["scores"].keys() == {"before", "after"} for each in found)


def test_a_name_stands_for_one_recipe(claims):
    """Two recipes under one name: the result of one would be taken for the other's."""
    by_name = {}
    for claim in claims.run.CLAIMS:
        for arm in claim.arms.values():
            assert by_name.setdefault(arm.what.name, arm.what) == arm.what
    assert len(by_name) > 20
