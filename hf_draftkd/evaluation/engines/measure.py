"""The pair in an engine: plain and assisted decoding of the same prompts in turns, beside what was predicted."""

import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_draftkd.acceptance import (
    DRAFT_LENGTHS,
    Estimate,
    Latency,
    best_draft_length,
    bootstrap_paired_ratio_quotient,
    bootstrap_ratio,
    break_even_acceptance_rate,
    predicted_speedup,
)
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.engines import ENGINES
from hf_draftkd.evaluation.engines.config import EngineConfig
from hf_draftkd.evaluation.engines.launch import launched
from hf_draftkd.evaluation.engines.protocol import Engine, EngineAnswer, ServedPair
from hf_draftkd.evaluation.environment import processor_name
from hf_draftkd.evaluation.recommendation import is_faster, times_text
from hf_draftkd.evaluation.report import EngineResult, Recommendation, SpeculationReport
from hf_draftkd.evaluation.scoring import Text
from hf_draftkd.evaluation.statistics import sampled_agree
from hf_draftkd.evaluation.texts import TextSet, is_recorded, recorded_texts

_STEP_TIME_LENGTHS = (1, 8)
_STEP_TIME_PROMPTS = 12
# Rounding decides near-ties in another engine; another model agrees with hardly any text.
_FEW_EQUAL = 0.5


def evaluate_in_engine(
    report: SpeculationReport,
    texts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_assistant_tokens: int | None = None,
    config: EngineConfig | None = None,
    **options: Any,
) -> list[EngineResult]:
    """Measure the pair in an engine that serves it, and add the results to the report.

    The prompts go to the engine as token ids. Plain and assisted requests take turns, one at a time; the ratio's
    interval is over prompts. Without a server that decodes plainly, calls are counted and no speed-up is reported.
    Greedy texts are compared with the target's own. The best draft length follows from step times taken in the engine:
    with `launch` at several draft lengths, otherwise at the one that is served.

        rows = generate_alignment_data(target, tokenizer, prompts, temperatures=(0.0, 1.0))
        report = evaluate_draft(draft, target, tokenizer, dataset=rows)
        evaluate_in_engine(report, rows, tokenizer, engine="vllm", endpoint=URL, plain_endpoint=OTHER_URL)

    Args:
        report: What `evaluate_draft` found on these texts.
        texts: Alignment data: prompts and the target's own answers, with the setting of each. Those written under
            another setting than the report's are left out.
        tokenizer: The pair's.
        num_assistant_tokens: Draft length γ, the one that a running server was started with; by default the report's,
            or the longest that a parallel draft has.
        config: Which engine, and where.
        **options: Fields of `EngineConfig`, which take precedence over those of `config`.

    Returns:
        One entry for each decoding setting, also in `report.engines`, which gets each as soon as it is there. A warning
        of the report names a setting that the engine cannot decode.

    Raises:
        ConnectionError: A server does not answer.
        ValueError: An engine does not start, has no draft, gives other token ids for a prompt's text, or cuts answers.
    """
    config = replace(config or EngineConfig(), **options)
    if config.engine is None:
        raise ValueError("Name the `engine`: llama.cpp, vllm or openvino.")
    asked = {each.decoding for each in report.settings}
    text_sets = [each for each in written_texts(texts) if each.setting in asked]
    if not text_sets:
        raise ValueError(
            f"None of the texts was written under a setting of the report, which has {'; '.join(map(str, asked))}. "
            "Give the texts that it is about."
        )
    engine = ENGINES[config.engine]
    longest = DRAFT_LENGTHS[-1]
    if config.parallel_drafting:
        longest = max((each.parallel.num_tokens for each in report.settings if each.parallel), default=0)
        if not longest:
            raise ValueError(f"`parallel_drafting` needs a parallel draft, which {report.draft.name} is not.")
    length = num_assistant_tokens or min(report.num_assistant_tokens, longest)
    if not 1 <= length <= longest:
        raise ValueError(
            f"`num_assistant_tokens={length}` cannot be compared with a prediction, which there is from 1 to {longest}."
        )
    results = []
    for found in text_sets:
        reason = engine.fault(found.setting, config.launch)
        if reason is None:
            try:
                results.append(_measure(engine, report, found, tokenizer, length, config))
            except (ValueError, ConnectionError) as error:
                if not results:
                    raise
                reason = str(error).rstrip(".")  # what was measured before is kept
        if reason is not None:
            report.warnings.append(f"{found.setting} was not measured in {engine.name}: {reason}.")
    return results


def written_texts(texts: Dataset) -> list[TextSet]:
    """The texts by the setting that the target wrote them under; a `ValueError` if they do not say it."""
    texts = texts.with_format(None)
    if not is_recorded(texts):
        raise ValueError(
            "The texts do not say under which setting the target wrote them. Let it write them with "
            "`generate_alignment_data`; on the command line, give prompts or `--regenerate`."
        )
    return recorded_texts(texts)


def check_settings(config: EngineConfig, settings: Sequence[DecodingSetting]) -> None:
    """Raise a `ValueError` where the engine decodes none of the settings rightly: before the pair is evaluated."""
    if config.engine is None:
        return
    engine = ENGINES[config.engine]
    reasons = [engine.fault(setting, config.launch) for setting in settings]
    if None not in reasons:
        asked = ", ".join(map(str, settings))
        raise ValueError(f"{engine.name} cannot measure {asked}: {reasons[0]}. Ask for another setting.")


def check_servers(config: EngineConfig) -> None:
    """Whether the servers answer, or can be started: before the pair is evaluated.

    Raises:
        ValueError: They cannot.
        ConnectionError: They do not answer.
    """
    if config.engine is None:
        return
    engine = ENGINES[config.engine]
    for url in (config.endpoint, config.plain_endpoint):
        if url:
            engine.version(url)
    program = config.engine_binary or engine.binary
    if config.launch and shutil.which(program) is None:
        raise ValueError(f"There is no program {program!r} to launch {engine.name} with: name it with `engine_binary`.")
    for model in config.engine_models or ():
        if not os.path.exists(model):
            raise ValueError(f"`engine_models` names {model!r}, which is not there.")


def _flags(engine: Engine, pair: ServedPair) -> str:
    """The command that serves a pair, as it may be published: of files no more than their names, and no port."""
    names: dict[str, Any] = {
        name: os.path.basename(path)
        for name, path in vars(pair).items()
        if isinstance(path, str) and os.path.exists(path)
    }
    words, variables = engine.command(replace(pair, **names), 0)
    port = words.index("--port")
    kept = [os.path.basename(word) if os.path.isabs(word) else word for word in words[:port] + words[port + 2 :]]
    return " ".join([*(f"{name}={value}" for name, value in variables.items()), *kept])


@dataclass(frozen=True)
class _Questions:
    """The prompts of one setting, as they are put to any server of the engine."""

    engine: Engine
    prompts: list[list[int]]
    setting: DecodingSetting
    limit: int

    def ask(self, url: str, place: int, seed: int = 0, limit: int | None = None) -> EngineAnswer:
        prompt, limit = self.prompts[place], limit or self.limit
        found = self.engine.complete(url, prompt, self.setting, limit, seed)
        if found.is_cut:
            raise ValueError(
                f"{self.engine.name} at {url} cut an answer to a prompt of {len(prompt)} tokens, since its context is "
                f"full. Start it with a context of at least {len(prompt) + limit + 1} tokens."
            )
        if not found.token_ids:
            raise ValueError(f"{self.engine.name} at {url} gave no token ids: it is too old, or another server.")
        return found

    def check_tokens(self, url: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Whether the engine reads the prompts' texts as the same ids: another tokenizer is another model."""
        for number, prompt in enumerate(self.prompts):
            text = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
            mine = tokenizer(text, add_special_tokens=False)["input_ids"]
            theirs = self.engine.tokenize(url, text)
            if mine != theirs:
                place = len(os.path.commonprefix([mine, theirs]))  # noqa: RUF071 - of lists
                raise ValueError(
                    f"{self.engine.name} at {url} has another tokenizer: of prompt {number} token {place} is "
                    f"{theirs[place : place + 1]} there and {mine[place : place + 1]} here, after "
                    f"{tokenizer.decode(mine[max(place - 8, 0) : place])!r}. Serve the model that was evaluated."
                )

    def step_seconds(self, url: str, runs: Sequence[Sequence[EngineAnswer]], per: str) -> float:
        """Seconds of a step after the prompt: those of whole answers, less those of an answer of one token."""
        timed = runs[:_STEP_TIME_PROMPTS]
        first = [median(self.ask(url, place, limit=1).seconds for _ in range(3)) for place in range(len(timed))]
        seconds = sum(_sums(timed, "seconds")) - sum(len(found) * one for found, one in zip(timed, first, strict=True))
        steps = sum(_sums(timed, per))
        if steps == 0:
            raise ValueError("Every answer has one token, so no step could be timed. Give prompts with longer answers.")
        return max(seconds / steps, 1e-9)


def _measure(
    engine: Engine,
    report: SpeculationReport,
    texts: TextSet,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    config: EngineConfig,
) -> EngineResult:
    setting, chosen = texts.setting, texts.texts[: config.engine_prompts]
    prompts = [list(text.prompt_ids) for text in chosen]
    limit = max(report.max_new_tokens, *(len(text.completion_ids) for text in chosen))
    target, draft = config.engine_models or [report.target.name, report.draft.name]
    pair = ServedPair(
        target=target,
        draft=draft,
        num_assistant_tokens=length,
        is_greedy=setting.is_greedy,
        threads=config.engine_threads,
        max_context=max(map(len, prompts)) + limit + max(DRAFT_LENGTHS) + 1,
        binary=config.engine_binary or engine.binary,
        dtype=report.target.dtype or "auto",
        parallel_drafting=config.parallel_drafting,
    )
    questions = _Questions(engine, prompts, setting, limit)
    # When sampling only the server's user knows how its draft does.
    rule = "exact_match" if setting.is_greedy else engine.sampled_rule if config.launch else None
    efficiency = _computed(report, setting, rule, in_one_pass=config.parallel_drafting)
    predicted = None if efficiency is None else efficiency[length]

    def served(pair: ServedPair) -> AbstractContextManager[str]:
        running = config.endpoint if pair.draft else config.plain_endpoint
        return launched(engine, pair) if config.launch else nullcontext(running or "")

    with served(replace(pair, draft=None)) as plain_url, served(pair) as url:
        version = engine.version(url)
        longest = max(range(len(chosen)), key=lambda place: len(chosen[place].completion_ids))
        plain, assisted = _in_turns(questions, plain_url, url, tokenizer, config.engine_rounds, longest)
        call = questions.step_seconds(url, assisted, "num_spec_steps")
        target_step = questions.step_seconds(plain_url, plain, "num_later_tokens") if plain_url else None
    tokens, seconds, steps, drafted, accepted = (
        _sums(assisted, name)
        for name in ("num_tokens", "seconds", "num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens")
    )
    result = EngineResult(
        engine=engine.name,
        version=version,
        flags=_flags(engine, pair) if config.launch else None,
        threads=config.engine_threads if config.launch else None,
        hardware=processor_name() if config.launch else None,
        decoding=setting,
        verification=rule,
        num_assistant_tokens=length,
        num_prompts=len(prompts),
        num_rounds=config.engine_rounds,
        num_identical=_num_equal(assisted, chosen, tokenizer) if setting.is_greedy else None,
        num_plain_identical=_num_equal(plain, chosen, tokenizer) if setting.is_greedy and plain_url else None,
        num_spec_steps=sum(steps),
        num_draft_tokens=sum(drafted),
        num_accepted_draft_tokens=sum(accepted),
        mean_acceptance_length=bootstrap_ratio(_sums(assisted, "num_later_tokens"), steps),
        predicted_mean_acceptance_length=predicted,
        draft_acceptance_rate=sum(accepted) / sum(drafted),
        predicted_draft_acceptance_rate=None if predicted is None else (predicted.value - 1) / length,
        tokens_per_second=sum(tokens) / sum(seconds),
        call_seconds={length: call},
    )
    by_kind = {(each.engine, each.decoding, each.flags): each for each in (*(report.engines or []), result)}
    report.engines = list(by_kind.values())  # before what can still fail
    report.warnings += [note for note in _notes(engine, result) if note not in report.warnings]
    if target_step is not None:
        plain_tokens, plain_seconds = (_sums(plain, name) for name in ("num_tokens", "seconds"))
        result.plain_tokens_per_second = sum(plain_tokens) / sum(plain_seconds)
        result.speedup = bootstrap_paired_ratio_quotient(tokens, seconds, plain_tokens, plain_seconds)
        result.target_step_seconds = target_step
        result.recommendation = recommend_in_engine(result, efficiency)  # it stays where a later server does not start
        others = set(_STEP_TIME_LENGTHS) & set(efficiency or ()) - {length} if config.launch else set[int]()
        for other in sorted(others):
            with served(replace(pair, num_assistant_tokens=other)) as url:
                questions.ask(url, 0)
                answers = [[questions.ask(url, place, place)] for place in range(len(prompts[:_STEP_TIME_PROMPTS]))]
                result.call_seconds[other] = questions.step_seconds(url, answers, "num_spec_steps")
        result.recommendation = recommend_in_engine(result, efficiency)
        result.call_seconds = dict(sorted(result.call_seconds.items()))
    return result


def _computed(
    report: SpeculationReport, setting: DecodingSetting, rule: str | None, *, in_one_pass: bool
) -> dict[int, Estimate] | None:
    """The report's block efficiency under the engine's rule, by draft length; None where it was not computed."""
    for each in report.settings:
        if (each.decoding, each.verification) == (setting, rule):
            found = each.parallel if in_one_pass else each
            return found.block_efficiency if found else None
    return None


def _in_turns(
    questions: _Questions, plain_url: str, url: str, tokenizer: PreTrainedTokenizerBase, rounds: int, longest: int
) -> tuple[list[list[EngineAnswer]], list[list[EngineAnswer]]]:
    """Every prompt's answers, one a round: plain ones, of which there are none without a server, and with the draft.

    `longest` is the prompt that is asked first, to see whether anything is drafted: nothing is for a single token.
    """
    engine, count = questions.engine, len(questions.prompts)
    plain: list[list[EngineAnswer]] = [[] for _ in range(count)]
    assisted: list[list[EngineAnswer]] = [[] for _ in range(count)]
    ways = [(assisted, url), *([(plain, plain_url)] if plain_url else [])]
    for _, address in ways:
        questions.check_tokens(address, tokenizer)
    # The first requests of a server pay for compilation and memory.
    if plain_url and questions.ask(plain_url, longest).num_draft_tokens:
        raise ValueError(f"The server of plain decoding at {plain_url} drafts: start it without a draft.")
    if not questions.ask(url, longest).num_draft_tokens:
        raise ValueError(
            f"{engine.name} at {url} drafted nothing, or does not count: it has no draft loaded. Start it with the "
            "draft, as the card's command shows."
        )
    for number in logging.tqdm(range(rounds * count), desc=f"{engine.name}, {questions.setting}", unit="prompt"):
        for runs, address in ways if number % 2 else reversed(ways):
            time.sleep(engine.busy_seconds if plain_url else 0)
            runs[number % count].append(questions.ask(address, number % count, number))
    return plain, assisted


def _notes(engine: Engine, found: EngineResult) -> Iterator[str]:
    """What to know of a result beside its numbers."""
    if found.num_plain_identical is not None and found.num_plain_identical < _FEW_EQUAL * found.num_prompts:
        yield (
            f"Only {found.num_plain_identical} of {found.num_prompts} plain greedy texts of {engine.name} are the "
            "target's own: it serves another model, number format or quantisation than the one that was evaluated."
        )
    counted, predicted = found.mean_acceptance_length, found.predicted_mean_acceptance_length
    calls = found.num_spec_steps
    if predicted is not None and not sampled_agree(predicted, counted, counted.value * calls, calls):
        yield (
            f"{engine.name} counted {counted.value:.2f} tokens per target call for {found.decoding}, "
            f"{predicted.value:.2f} were predicted: more than their intervals apart. It does not verify drafts by "
            f"{found.verification}, or serves another model."
        )
    # Builds from source packages may not know their own version.
    if engine.tested_version not in found.version and "unknown" not in found.version:
        yield (
            f"{engine.name} says it is version {found.version}; this package was tested with {engine.tested_version}."
        )


def recommend_in_engine(found: EngineResult, efficiency: dict[int, Estimate] | None) -> Recommendation:
    """The verdict for one engine, on the machine that served it, from what was measured with a draft and plainly.

    `efficiency` is block efficiency by draft length, where it is known for the engine's rule.
    """
    length, calls = found.num_assistant_tokens, found.call_seconds
    speedup, target_step = found.speedup, found.target_step_seconds
    assert speedup is not None
    assert target_step is not None
    lengths = sorted(calls)
    # A longer draft takes longer: where it did not, something else used the machine meanwhile.
    is_steady = all(calls[shorter] < calls[longer] for shorter, longer in pairwise(lengths))
    if len(calls) == 1 or not is_steady:  # what a drafted token takes is not known
        efficiency = None
    best, break_even = length, None
    expected = found.mean_acceptance_length.value * target_step / calls[length]
    if efficiency is not None:
        # A call takes a fixed time and one for every drafted token.
        slope, fixed = np.polyfit(list(calls), list(calls.values()), deg=1)
        fixed, slope = max(float(fixed), 1e-9), max(float(slope), 1e-9)
        times = Latency(target_step, slope, {each + 1: fixed for each in DRAFT_LENGTHS})
        values = {each: estimate.value for each, estimate in efficiency.items()}
        best = best_draft_length(values, times).num_assistant_tokens
        expected = predicted_speedup(values[best], best, times)
        break_even = break_even_acceptance_rate(times, tuple(values))
    worth_it = is_faster(speedup.value) or (best != length and is_faster(expected))
    verdict = "Worth it" if worth_it else "Not worth it"
    if worth_it and not is_faster(speedup.value):
        verdict = f"Worth it by prediction, with {best} draft tokens a step,"
    reason = (
        f"{verdict} in {found.engine} on this machine, {found.decoding}: measured {times_text(speedup)} the plain "
        f"speed with {length} draft tokens a step"
    )
    if not is_steady:
        reason += (
            f"; the times of steps with {', '.join(map(str, lengths))} draft tokens do not grow, since the machine was "
            "not quiet, so no best length follows"
        )
    if efficiency is not None:
        reason += (
            f"; by step times measured in {found.engine}, {best} would be best, predicted {expected:.2f} times the "
            "plain speed after the prompt"
        )
    if speedup.low is not None and speedup.leaves_open(1):
        reason += ". A gain and a loss both lie within this interval: more prompts would decide"
    return Recommendation(
        worth_it=worth_it,
        num_assistant_tokens=best,
        predicted_speedup=expected,
        break_even_acceptance_rate=break_even,
        reason=f"{reason}.",
    )


def _sums(runs: Sequence[Sequence[EngineAnswer]], name: str) -> list[Any]:
    """A number of each prompt's answers, added up over the rounds."""
    return [sum(getattr(each, name) for each in found) for found in runs]


def _num_equal(
    runs: Sequence[Sequence[EngineAnswer]], texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase
) -> int:
    """Prompts to which every answer is the target's own, end tokens aside."""
    longest = max(len(text.completion_ids) for text in texts)
    ends = {text.completion_ids[-1] for text in texts if len(text.completion_ids) < longest} | {tokenizer.eos_token_id}

    def is_equal(found: Sequence[EngineAnswer], text: Text) -> bool:
        own = _without_end(text.completion_ids, ends)
        return all(_without_end(each.token_ids, ends) == own for each in found)

    return sum(map(is_equal, runs, texts))


def _without_end(tokens: Sequence[int], ends: Collection[int | None]) -> list[int]:
    tokens = list(tokens)
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens
