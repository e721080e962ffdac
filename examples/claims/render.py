"""Make README.md of this folder from the results alone: every figure in it is one that a cell stored.

python examples/claims/render.py [--results_dir DIR] [--pair DIR] [--only A3] [--lower_rates 3e-4] [--output PAGE]
                                 [--readme PAGE]

The first comparison of each claim, which is what the paper makes most of, goes into the page `--readme` too, beside
what came of it on SmolLM2.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import HERE, LOWER_RATES, RATES, Claim, Results
from lab import pair_weights
from recipes import KEPT_TOKENS, SIZES, TEMPERATURES, Sizes
from run import CLAIMS
from verdicts import RULES, Arms, Estimate, Finding, level

from hf_draftkd.models.demo import DEMO
from hf_draftkd.models.identity import stored_parameters
from hf_draftkd.utils.files import write_text

HEAD = """\
# What the papers claim, tried on a pair

Made by `render.py` from the files under `results/`; no figure here is typed by hand. Each claim has its script, which
says how it was tried; `run.py` runs them all and resumes over days:

    python examples/claims/run.py --list
    python examples/claims/run.py --only A3 --budget_seconds 3600
    python examples/claims/render.py --readme README.md   # this page, and the table in the root README

A verdict is about this pair: a target of {target} parameters and a draft of {draft}. "Refuted" says that the effect
is absent there, reversed, or smaller than the smallest that the paper reports; it says nothing of a pair a thousand
times as large. Claim A1 needs `--data_dir`, a folder of public prompts that its script names. For another
pair give both scripts `--pair DIR --sizes small`, where it does best at the smallest rate `--lower_rates 3e-4`, and
`render.py` an `--output PAGE` in the place of `--readme`; `examples/smollm2/pair.py` makes a pair of SmolLM2.

τ(γ) is the number of tokens per target call where γ are drafted. Scores are exact, over {prompts} held-out queries
that the target answered greedily and at temperature 1 (up to {answer_tokens} tokens); both temperatures are scored
from the same drafts. Unless a claim says otherwise, a draft is trained for three epochs over the answers to {training}
queries (batches of {batch_size}, the rate falling to 0) from the tuned draft: the pair's draft after {tuning_steps}
steps on given answers to other queries. White-box training reads the {kept} likeliest tokens of each of the target's
distributions and the sum of the rest. Each arm's rate is the best of {rates}, or of those that its script names, on
the dev queries with the first seed. Brackets are 95% intervals over prompts and seeds, resampled together for both
arms; three seeds say little of the spread between seeds.

Verdicts follow from these rules:

{rules}
"""


MARKS = "<!-- claims: made by examples/claims/render.py -->\n", "<!-- end of claims -->\n"
# The other pair whose results are stored: its folder, the lower rates that it was tried at, and claims that do not
# suit it although some of their cells, which serve other claims, are there.
SMOLLM2 = "faf714ce-265d14c4", (3e-4,), {"C2"}
Judged = Sequence[tuple[Claim, Arms, list[Finding]]]


def stored_results(folder: Path, lower_rates: tuple[float, ...]) -> Results:
    """The results of a pair that is not at hand: they say which weights and sizes they are of."""
    any_of_them = json.loads(next(folder.glob("*.json")).read_text(encoding="utf-8"))
    return Results(folder.parent, any_of_them["pair"], Sizes(**any_of_them["sizes"]), lower_rates)


def judged(results: Results, claims: Sequence[Claim], seeds: int) -> Judged:
    """Every claim with the results of its arms, and what follows from them."""
    found = []
    for claim in claims:
        of_arms = {label: results.of_arm(arm, seeds) for label, arm in claim.arms.items()}
        arms = {label: each for label, each in of_arms.items() if each}
        found.append((claim, arms, claim.findings(arms)))
    return found


def compared(findings: Sequence[Finding]) -> dict[tuple[str, str], list[Finding]]:
    """What was compared, and what the paper says of it -> the findings at each temperature."""
    found: dict[tuple[str, str], list[Finding]] = {}
    for each in findings:
        found.setdefault((each.says, each.paper), []).append(each)
    return found


def effects(findings: Sequence[Finding]) -> list[str]:
    """What was found at each temperature."""
    return [f"{each.setting}: {each.here}" if each.setting else each.here for each in findings]


def verdicts(found: Judged) -> list[str]:
    """The table of verdicts, one row for all temperatures of a comparison."""
    lines = ["| claim | compared | paper | here | verdict |", "|---|---|---|---|---|"]
    for claim, _, findings in found:
        for (says, paper), settings in compared(findings).items():
            judged_as = dict.fromkeys(each.verdict for each in settings)
            row = claim.name, says, paper, "<br>".join(effects(settings)), "<br>".join(judged_as)
            lines.append(f"| {' | '.join(row)} |")
        if not findings:
            lines.append(f"| {claim.name} | {claim.says} | | | not run yet |")
    return lines


def headlines(pairs: Mapping[str, Judged]) -> list[str]:
    """The first comparison of each claim that every pair has on which it was tried; blank where a pair has it not."""
    lines = [f"| claim | compared | paper | {' | '.join(pairs)} |", f"|{'---|' * (3 + len(pairs))}"]
    for of_pairs in zip(*pairs.values(), strict=True):
        claim = of_pairs[0][0]
        by_pair = [compared(findings) for _, _, findings in of_pairs]
        if not any(by_pair):
            lines.append(f"| {claim.name} | {claim.says} | | not run yet |{' |' * (len(pairs) - 1)}")
            continue
        tried = [each for each in by_pair if each]
        shared = [each for each in tried[0] if all(each in others for others in tried)]
        first = (shared or list(tried[0]))[0]
        cells = [_outcome(each.get(first, [])) for each in by_pair]
        lines.append(f"| {' | '.join([claim.name, *first, *cells])} |")
    return lines


def _outcome(findings: Sequence[Finding]) -> str:
    """Effects and verdicts in one cell; a verdict that all temperatures share stands once."""
    shared = {each.verdict for each in findings}
    if len(shared) == 1:
        return "<br>".join([*filter(None, effects(findings)), *shared])
    return "<br>".join(f"{line}, {each.verdict}" for line, each in zip(effects(findings), findings, strict=True))


def page(results: Results, found: Judged, pair: Path) -> str:
    """The whole page."""
    sections = [section(claim, arms) for claim, arms, findings in found if findings]
    sizes = results.sizes
    head = HEAD.format(
        target=f"{stored_parameters(pair / 'target'):,}",
        draft=f"{stored_parameters(pair / 'draft'):,}",
        prompts=sizes.test,
        answer_tokens=sizes.answer_tokens,
        training=sizes.prompts,
        batch_size=sizes.batch_size,
        tuning_steps=sizes.tuning_steps,
        kept=KEPT_TOKENS,
        rates=", ".join(f"{rate:g}" for rate in RATES + results.lower_rates),
        rules=RULES,
    )
    return "\n".join([head, "## Verdicts", "", *verdicts(found), "", *sections, provenance(results)]) + "\n"


def with_headlines(readme: str, pairs: Mapping[str, Judged]) -> str:
    """A page with the first comparison of each claim, at both temperatures, between its marks."""
    before, rest = readme.split(MARKS[0])
    _, behind = rest.split(MARKS[1])
    return "".join([before, MARKS[0], "\n".join(headlines(pairs)), "\n", MARKS[1], behind])


def section(claim: Claim, arms: Arms) -> str:
    """A claim's arms: at which rate, how often, how good."""
    lines = [f"## {claim.name}", "", f"{claim.says} ({claim.source})", ""]
    gamma = next((each.gamma for each in claim.comparisons if each.metric == "block_efficiency"), 5)
    metrics = {"acceptance": "acceptance", f"τ({gamma})": "block_efficiency"}
    heads = [f"{name}, {setting}" for name in metrics for setting in TEMPERATURES]
    stored = {on for results in arms.values() for on in results[0].get("scores", ())}
    for on in ON:
        # Some drafts are scored on documentation for another claim.
        if on not in stored or (on == "general" and all(each.on != on for each in claim.comparisons)):
            continue
        lines += [f"| {ON[on]} | rate | seeds | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 3)}"]
        for label, results in arms.items():
            if on not in results[0]["scores"]:
                continue
            rate = results[0]["cell"]["rate"]
            cells = [
                _interval(level(results, on, setting, metric, gamma))
                for metric in metrics.values()
                for setting in TEMPERATURES
            ]
            lines.append(f"| {label} | {'' if rate is None else rate} | {len(results)} | {' | '.join(cells)} |")
        lines.append("")
    if table := claim.table(arms):
        lines += [table, ""]
    if claim.notes:
        lines += [claim.notes, ""]
    return "\n".join(lines)


# The texts that are scored, as tables call them. Rates are chosen by `dev`, which is not shown.
ON = {
    "test": "test queries",
    "general": "documentation",
    "before": "the target before tuning",
    "after": "the target after tuning",
    "whole": "test queries, all ids",
    "listed": "test queries, listed ids",
}


def _interval(found: Estimate) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def provenance(results: Results) -> str:
    """What made the results, as they say themselves."""
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.folder.glob("*.json"))]
    if not stored:
        return "No cell has been run.\n"
    made = sorted(each["provenance"]["made"][:10] for each in stored)
    versions = sorted({_words(each["provenance"]["versions"]) for each in stored})
    machines = sorted(
        {f"{each['provenance']['processor']}, {each['provenance']['threads']} thread(s)" for each in stored}
    )
    minutes = sum(each["seconds"] for each in stored) / 60
    weights = ", ".join(f"{name} `{checksum}`" for name, checksum in results.weights.items())
    return "\n".join(
        [
            "## Provenance",
            "",
            f"- {len(stored)} cells, made {' to '.join(dict.fromkeys((made[0], made[-1])))}, {minutes:.0f} minutes of "
            f"training; sha256 of the weights: {weights}.",
            f"- {'; '.join(machines)}.",
            *(f"- {each}." for each in versions),
        ]
    )


def _words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=HERE / "results")
    parser.add_argument("--pair", type=Path, default=DEMO)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lower_rates", **LOWER_RATES)
    parser.add_argument("--only", nargs="+", metavar="CLAIM", help="these claims, as A3")
    parser.add_argument("--sizes", choices=SIZES, default="full", help="those that the results were made with")
    parser.add_argument("--output", type=Path, default=HERE / "README.md")
    parser.add_argument("--readme", type=Path, help="a page with marks for the first comparison of each claim")
    options = parser.parse_args()
    results = Results(options.results_dir, pair_weights(options.pair), SIZES[options.sizes], tuple(options.lower_rates))
    chosen = [claim for claim in CLAIMS if not options.only or claim.name in options.only]
    found = judged(results, chosen, options.seeds)
    write_text(options.output, page(results, found, options.pair))
    if options.readme is not None:
        folder, lower_rates, unsuited = SMOLLM2
        smollm2 = judged(stored_results(HERE / "results" / folder, lower_rates), chosen, options.seeds)
        smollm2 = [(claim, arms, [] if claim.name in unsuited else each) for claim, arms, each in smollm2]
        pairs = {"demo pair": found, "SmolLM2-135M": smollm2}
        write_text(options.readme, with_headlines(options.readme.read_text(encoding="utf-8"), pairs))


if __name__ == "__main__":
    main()
