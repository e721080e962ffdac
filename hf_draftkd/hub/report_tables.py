"""From a report's JSON to the numbers and tables of a card. Nothing is computed here that the report does not say.

The report is the dictionary that `SpeculationReport.to_json()` gives. Every reader below answers None, or leaves the
column out, where a figure is absent.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.hub.markdown import Markdown, code, estimate_text, table, text, value_of

Json = Mapping[str, Any]


def decoding_name(setting: Json) -> str:
    """`greedy` or `temperature 1, top-p 0.95`: how an entry of `settings` was decoded."""
    return str(DecodingSetting(**setting["decoding"]))


def same_setting(one: Json, other: Json) -> bool:
    """Whether two entries describe the same decoding and verification."""
    return all(one[key] == other[key] for key in ("decoding", "verification"))


def tuned_length(report: Json | None) -> int | None:
    """The draft length that the report recommends, None where it recommends none."""
    return None if report is None else report.get("recommendation", {}).get("num_assistant_tokens")


def shown_length(report: Json, settings: Iterable[Json]) -> int | None:
    """The draft length of the tables: the recommended one, else the one asked about, else the longest measured."""
    lengths = sorted({int(length) for setting in settings for length in setting.get("block_efficiency", {})})
    for wanted in (tuned_length(report), report.get("num_assistant_tokens")):
        if wanted in lengths:
            return wanted
    return lengths[-1] if lengths else None


def domains(report: Json) -> list[tuple[str | None, Sequence[Json]]]:
    """(domain, settings) pairs: the whole first, then the report's groups.

    A group that holds every text is the whole again: it gives the whole its name, where that has none, and is not
    repeated.
    """
    whole: Sequence[Json] = report.get("settings", ())
    name = report.get("prompts", {}).get("domain")
    groups: dict[str, Sequence[Json]] = dict(report.get("groups", {}))
    if len(groups) == 1:
        (only, settings), *_ = groups.items()
        if [entry["num_texts"] for entry in settings] == [entry["num_texts"] for entry in whole]:
            return [(name or only, whole)]
    return [(name, whole), *groups.items()]


def acceptance_table(report: Json, settings: Sequence[Json], *, is_whole: bool) -> Markdown | None:
    """Acceptance rate and block efficiency per setting; for the whole also the stock draft and the difference."""
    length = shown_length(report, settings)
    stock = report.get("baseline", {}).get("settings", ()) if is_whole else ()
    differences = report.get("paired_difference", ()) if is_whole else ()
    headers = [
        "Decoding",
        "Verification",
        "Texts",
        "Acceptance rate α",
        f"Tokens per target call τ (γ = {length})",
        "τ in transformers' `generate`",
        "α of the stock draft",
        "τ of the stock draft",
        "Gain in α, paired",
        "Gain in τ, paired",
    ]
    rows = []
    for setting in settings:
        old: Json = next((other for other in stock if same_setting(setting, other)), {})
        gain: Json = next((other for other in differences if same_setting(setting, other)), {})
        rows.append(
            [
                decoding_name(setting),
                code(setting["verification"]) if "verification" in setting else None,
                setting.get("num_texts"),
                estimate_text(setting.get("acceptance_rate"), 3),
                estimate_text(setting.get("block_efficiency", {}).get(str(length)), 2),
                estimate_text(setting.get("transformers_block_efficiency", {}).get(str(length)), 2),
                estimate_text(old.get("acceptance_rate"), 3),
                estimate_text(old.get("block_efficiency", {}).get(str(length)), 2),
                estimate_text(gain.get("acceptance_rate"), 3, signed=True),
                _gain_text(gain.get("block_efficiency", {}), length),
            ]
        )
    return table(headers, rows) if rows else None


def _gain_text(gains: Json, length: int | None) -> Markdown | None:
    if str(length) in gains:
        return estimate_text(gains[str(length)], 2, signed=True)
    if not gains:
        return None
    # The difference was taken at another length than the table's: say which.
    other, gain = next(iter(gains.items()))
    return Markdown(f"{estimate_text(gain, 2, signed=True)} (γ = {text(other)})")


def length_table(settings: Sequence[Json]) -> Markdown | None:
    """Block efficiency for every draft length that was computed."""
    lengths = sorted({int(length) for setting in settings for length in setting.get("block_efficiency", {})})
    if len(lengths) < 2:
        return None
    rows = []
    for setting in settings:
        efficiency = setting.get("block_efficiency", {})
        cells = [estimate_text(value_of(efficiency.get(str(length))), 2) for length in lengths]
        rows.append([f"{decoding_name(setting)}, {setting.get('verification', 'rule not recorded')}", *cells])
    return table(["τ at γ =", *map(str, lengths)], rows)


def speed_table(settings: Sequence[Json]) -> Markdown | None:
    """Counted acceptance and wall-clock of real `generate(assistant_model=...)`, per setting that was run."""
    headers = [
        "Decoding",
        "Prompts",
        "Draft length",
        "Plain, tokens/s",
        "Assisted, tokens/s",
        "Speed-up",
        "Tokens per target call, counted",
        "Draft tokens accepted, counted",
    ]
    rows = []
    for setting in settings:
        run = setting.get("assisted")
        if run:
            rows.append(
                [
                    decoding_name(setting),
                    run.get("num_prompts"),
                    run.get("num_assistant_tokens"),
                    estimate_text(run.get("plain_tokens_per_second"), 1),
                    estimate_text(run.get("tokens_per_second"), 1),
                    estimate_text(run.get("speedup"), 2),
                    estimate_text(run.get("mean_acceptance_length"), 2),
                    estimate_text(run.get("draft_acceptance_rate"), 3),
                ]
            )
    return table(headers, rows) if rows else None


def verdict_rows(report: Json) -> list[tuple[Markdown, Json]]:
    """(setting in words, its recommendation) for every setting that has one."""
    return [
        (Markdown(f"{text(decoding_name(setting))}, {code(setting.get('verification', 'rule not recorded'))}"), advice)
        for setting in report.get("settings", ())
        if (advice := setting.get("recommendation"))
    ]


def hardware_text(hardware: Json | None) -> str | None:
    """The machine of a report in words."""
    if hardware is None:
        return None
    count = hardware.get("num_devices", 1)
    details = [hardware["device"], hardware["dtype"]]
    if hardware["device"] == "cpu":
        details.append(f"{hardware['num_threads']} threads")
    return f"{f'{count} × ' if count > 1 else ''}{hardware['name']} ({', '.join(map(str, details))})"
