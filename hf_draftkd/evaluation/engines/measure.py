"""The pair in an engine: plain and assisted decoding of the same prompts in turns, beside what was predicted."""

import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
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
from hf_draftkd.evaluation.engines.protocol import Completion, Engine, ServedPair
from hf_draftkd.evaluation.environment import processor_name
from hf_draftkd.evaluation.recommendation import is_faster, times_text
from hf_draftkd.evaluation.report import EngineResult, Recommendation, SettingResult, SpeculationReport
from hf_draftkd.evaluation.texts import TextSet, is_recorded, recorded_texts

_STEP_TIME_LENGTHS = (1, 8)
_STEP_TIME_PROMPTS = 12
# Rounding decides near-ties in another engine; another model agrees with hardly any text.
_FEW_EQUAL = 0.5


@dataclass
class _Runs:
    """What one prompt's requests gave, over the rounds."""

    completions: list[Completion] = field(default_factory=list)

    def total(self, name: str) -> float:
        return sum(getattr(completion, name) for completion in self.completions)

    @property
    def tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def later_tokens(self) -> int:
        """Those behind the first, which the prompt's own call writes."""
        return sum(max(len(completion.token_ids) - 1, 0) for completion in self.completions)


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
    interval is over prompts. Greedy texts are compared with the target's own. The best draft length follows from step
    times taken in the engine: with `launch` at several draft lengths, otherwise at the one that is served.

        rows = generate_alignment_data(target, tokenizer, prompts, temperatures=(0.0, 1.0))
        report = evaluate_draft(draft, target, tokenizer, dataset=rows)
        evaluate_in_engine(report, rows, tokenizer, engine="vllm", endpoint=URL, plain_endpoint=OTHER_URL)

    Args:
        report: What `evaluate_draft` found on these texts.
        texts: Alignment data: prompts and the target's own answers, with the setting of each.
        tokenizer: The pair's.
        num_assistant_tokens: Draft length γ, the one that a running server was started with; by default the report's.
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
    if not is_recorded(texts):
        raise ValueError(
            "The texts do not say under which setting the target wrote them. Let it write them with "
            "`generate_alignment_data`; on the command line, give prompts or `--regenerate`."
        )
    engine = ENGINES[config.engine]
    length = num_assistant_tokens or report.num_assistant_tokens
    results = []
    for found in recorded_texts(texts):
        reason = _unusable(engine, found.setting, config)
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
            engine.version(url.rstrip("/"))
    program = config.engine_binary or engine.binary
    if config.launch and shutil.which(program) is None:
        raise ValueError(f"There is no program {program!r} to launch {engine.name} with: name it with `engine_binary`.")
    for model in config.engine_models or ():
        if not os.path.exists(model):
            raise ValueError(f"`engine_models` names {model!r}, which is not there.")


def _measure(
    engine: Engine,
    report: SpeculationReport,
    texts: TextSet,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    config: EngineConfig,
) -> EngineResult:
    chosen = texts.texts[: config.engine_prompts]
    prompts = [list(text.prompt_ids) for text in chosen]
    longest = max(len(text.completion_ids) for text in chosen)
    limit = max(report.max_new_tokens, longest)
    served = _Served(engine, report, config, texts.setting, max(map(len, prompts)) + limit + max(DRAFT_LENGTHS) + 1)
    plain, assisted = [_Runs() for _ in prompts], [_Runs() for _ in prompts]
    with ExitStack() as stack:
        plain_url = stack.enter_context(served.plain())
        url = stack.enter_context(served.with_draft(length))
        for address in (plain_url, url):
            _check_tokens(engine, address, tokenizer, prompts)
        version = engine.version(url)
        ask = _Asking(engine, texts.setting, limit)
        # The first requests of a server pay for compilation and memory.
        if ask(plain_url, prompts[0], 0).num_draft_tokens:
            raise ValueError(f"The server of plain decoding at {plain_url} drafts: start it without a draft.")
        if not ask(url, prompts[0], 0).num_draft_tokens:
            raise ValueError(
                f"{engine.name} at {url} drafted nothing, or does not count: it has no draft loaded. Start it with the "
                "draft, as the card's command shows."
            )
        total = config.engine_rounds * len(prompts)
        with logging.tqdm(total=total, desc=f"{engine.name}, {texts.setting}", unit="prompt") as bar:
            for number in range(total):
                turn, place = divmod(number, len(prompts))
                ways = [(plain, plain_url), (assisted, url)]
                for runs, address in ways if number % 2 else reversed(ways):
                    runs[place].completions.append(ask(address, prompts[place], turn * len(prompts) + place))
                bar.update()
        steps = _StepTimes(ask, prompts[:_STEP_TIME_PROMPTS])
        target_step = steps.plain(plain_url, plain)
        calls = {length: steps.call(url, assisted)}
    for other in _STEP_TIME_LENGTHS if config.launch else ():
        if other != length:
            with served.with_draft(other) as url:
                ask(url, prompts[0], 0)
                calls[other] = steps.call(url)
    setting = _predicted(report, engine, texts.setting, config)
    efficiency = None if setting is None else setting.block_efficiency
    predicted = None if efficiency is None else efficiency[length]
    speedup = bootstrap_paired_ratio_quotient(
        [runs.tokens for runs in assisted],
        [runs.total("seconds") for runs in assisted],
        [runs.tokens for runs in plain],
        [runs.total("seconds") for runs in plain],
    )
    drafted = int(sum(runs.total("num_draft_tokens") for runs in assisted))
    accepted = int(sum(runs.total("num_accepted_draft_tokens") for runs in assisted))
    counted = bootstrap_ratio(
        [runs.later_tokens for runs in assisted], [runs.total("num_spec_steps") for runs in assisted]
    )
    identical = plain_identical = None
    if texts.setting.is_greedy:
        ends = {text.completion_ids[-1] for text in chosen if len(text.completion_ids) < longest}
        own = [_without_end(text.completion_ids, ends | {tokenizer.eos_token_id}) for text in chosen]
        identical, plain_identical = (
            sum(
                all(_without_end(each.token_ids, ends | {tokenizer.eos_token_id}) == text for each in found.completions)
                for found, text in zip(runs, own, strict=True)
            )
            for runs in (assisted, plain)
        )
        if plain_identical < _FEW_EQUAL * len(prompts):
            report.warnings.append(
                f"Only {plain_identical} of {len(prompts)} plain greedy texts of {engine.name} are the target's own: "
                "it serves another model, number format or quantisation than the one that was evaluated."
            )
    if predicted is not None and _differ(counted, predicted):
        report.warnings.append(
            f"{engine.name} counted {counted.value:.2f} tokens per target call for {texts.setting}, "
            f"{predicted.value:.2f} were predicted: more than their intervals apart. It does not verify drafts by "
            f"{setting.verification if setting else 'that rule'}, or serves another model."
        )
    note = f"{engine.name} says it is version {version}; this package was tested with {engine.tested_version}."
    # Builds from source packages may not know their own version.
    if engine.tested_version not in version and "unknown" not in version and note not in report.warnings:
        report.warnings.append(note)
    result = EngineResult(
        engine=engine.name,
        version=version,
        flags=served.flags,
        threads=config.engine_threads if config.launch else None,
        hardware=processor_name() if config.launch else None,
        decoding=texts.setting,
        verification=_verification(engine, texts.setting, config),
        num_assistant_tokens=length,
        num_prompts=len(prompts),
        num_rounds=config.engine_rounds,
        num_identical=identical,
        num_plain_identical=plain_identical,
        num_spec_steps=int(sum(runs.total("num_spec_steps") for runs in assisted)),
        num_draft_tokens=drafted,
        num_accepted_draft_tokens=accepted,
        mean_acceptance_length=counted,
        predicted_mean_acceptance_length=predicted,
        draft_acceptance_rate=accepted / drafted,
        predicted_draft_acceptance_rate=None if predicted is None else (predicted.value - 1) / length,
        tokens_per_second=sum(runs.tokens for runs in assisted) / sum(runs.total("seconds") for runs in assisted),
        plain_tokens_per_second=sum(runs.tokens for runs in plain) / sum(runs.total("seconds") for runs in plain),
        speedup=speedup,
        target_step_seconds=target_step,
        call_seconds=dict(sorted(calls.items())),
        recommendation=recommend_in_engine(
            engine.name, texts.setting, length, counted, efficiency, target_step, calls, speedup
        ),
    )
    report.engines = [
        *(
            each
            for each in report.engines or []
            if (each.engine, each.decoding, each.flags) != (result.engine, result.decoding, result.flags)
        ),
        result,
    ]
    return result


def recommend_in_engine(
    engine: str,
    setting: DecodingSetting,
    length: int,
    counted: Estimate,
    efficiency: dict[int, Estimate] | None,
    target_step: float,
    calls: dict[int, float],
    speedup: Estimate,
) -> Recommendation:
    """The verdict for one engine, on the machine that served it.

    Args:
        engine: Its name.
        setting: How it decoded.
        length: Draft length that was measured.
        counted: Tokens per target call at that length.
        efficiency: Block efficiency by draft length, where it is known for the engine's rule.
        target_step: Seconds per token of plain decoding there.
        calls: Seconds of drafting and one target call there, by draft length.
        speedup: Measured.
    """
    best, expected = length, counted.value * target_step / calls[length]
    break_even = None
    if efficiency is not None and len(calls) > 1:
        # A call takes a fixed time and one for every drafted token.
        slope, fixed = np.polyfit(list(calls), list(calls.values()), deg=1)
        fixed, slope = max(float(fixed), 1e-9), max(float(slope), 1e-9)
        times = Latency(target_step, slope, {each + 1: fixed for each in DRAFT_LENGTHS})
        values = {each: estimate.value for each, estimate in efficiency.items()}
        best = best_draft_length(values, times).num_assistant_tokens
        expected = predicted_speedup(values[best], best, times)
        break_even = break_even_acceptance_rate(times, tuple(values))
    worth_it = is_faster(speedup.value) or (best != length and is_faster(expected))
    reason = (
        f"{'Worth it' if worth_it else 'Not worth it'} in {engine} on this machine, {setting}: measured "
        f"{times_text(speedup)} the plain speed with {length} draft tokens a step"
    )
    if len(calls) > 1 and efficiency is not None:
        reason += (
            f"; by step times measured in {engine}, {best} would be best, predicted {expected:.2f} times behind the "
            "prompt"
        )
    if speedup.low is not None and speedup.high is not None and speedup.low <= 1 <= speedup.high:
        reason += ". A gain and a loss both lie within this interval: more prompts would decide"
    return Recommendation(
        worth_it=worth_it,
        num_assistant_tokens=best,
        predicted_speedup=expected,
        break_even_acceptance_rate=break_even,
        reason=f"{reason}.",
    )


class _Served:
    """The servers of one setting: those that run already, or started here."""

    def __init__(
        self,
        engine: Engine,
        report: SpeculationReport,
        config: EngineConfig,
        setting: DecodingSetting,
        max_context: int,
    ) -> None:
        self.engine, self.config = engine, config
        models = config.engine_models or [report.target.name, report.draft.name]
        self.pair = ServedPair(
            target=models[0],
            draft=models[1],
            num_assistant_tokens=report.num_assistant_tokens,
            is_greedy=setting.is_greedy,
            threads=config.engine_threads,
            max_context=max_context,
            binary=config.engine_binary or engine.binary,
            dtype=report.target.dtype or "auto",
        )
        self.flags: str | None = None

    @contextmanager
    def plain(self) -> Iterator[str]:
        yield from self._open(self.config.plain_endpoint, replace(self.pair, draft=None))

    @contextmanager
    def with_draft(self, length: int) -> Iterator[str]:
        pair = replace(self.pair, num_assistant_tokens=length)
        if self.config.launch and self.flags is None:
            words, variables = self.engine.command(pair, 0)
            self.flags = " ".join([*(f"{name}={value}" for name, value in variables.items()), *words[:-2]])
        yield from self._open(self.config.endpoint, pair)

    def _open(self, url: str | None, pair: ServedPair) -> Iterator[str]:
        if not self.config.launch:
            assert url is not None
            yield url.rstrip("/")
            return
        with launched(self.engine, pair) as address:
            yield address


@dataclass(frozen=True)
class _Asking:
    """Requests of one setting, whose answers are checked."""

    engine: Engine
    setting: DecodingSetting
    max_new_tokens: int

    def __call__(self, url: str, prompt: Sequence[int], seed: int, max_new_tokens: int | None = None) -> Completion:
        found = self.engine.complete(url, prompt, self.setting, max_new_tokens or self.max_new_tokens, seed)
        if found.is_cut:
            raise ValueError(
                f"{self.engine.name} at {url} cut an answer to a prompt of {len(prompt)} tokens, since its context is "
                f"full. Start it with a context of at least {len(prompt) + self.max_new_tokens + 1} tokens."
            )
        if not found.token_ids:
            raise ValueError(f"{self.engine.name} at {url} gave no token ids: it is too old, or another server.")
        return found


class _StepTimes:
    """Times behind the prompt: of a whole answer, less those of an answer of one token."""

    def __init__(self, ask: _Asking, prompts: Sequence[Sequence[int]]) -> None:
        self.ask, self.prompts = ask, prompts

    def plain(self, url: str, runs: Sequence[_Runs]) -> float:
        return self._seconds(url, runs, "later_tokens")

    def call(self, url: str, runs: Sequence[_Runs] | None = None) -> float:
        runs = runs or [_Runs([self.ask(url, prompt, place)]) for place, prompt in enumerate(self.prompts)]
        return self._seconds(url, runs, "num_spec_steps")

    def _seconds(self, url: str, runs: Sequence[_Runs], per: str) -> float:
        first = [statistics.median(self.ask(url, prompt, 0, 1).seconds for _ in range(3)) for prompt in self.prompts]
        seconds = steps = 0.0
        for found, start in zip(runs, first, strict=False):
            seconds += found.total("seconds") - start * len(found.completions)
            steps += found.later_tokens if per == "later_tokens" else found.total(per)
        if steps == 0:
            raise ValueError("Every answer has one token, so no step could be timed. Give prompts with longer answers.")
        return max(seconds / steps, 1e-9)


def _unusable(engine: Engine, setting: DecodingSetting, config: EngineConfig) -> str | None:
    """Why an engine cannot decode under a setting; None where it can."""
    if engine.name == "vllm" and config.launch and not setting.is_greedy:
        # `_expand_kernel_impl` in vllm/utils/cpu_triton_utils.py fills an int64 copy of a float tensor and drops it.
        return (
            f"vLLM {engine.tested_version} on a CPU samples with a draft from an uninitialised temperature "
            "(and ends its engine core for top-k and top-p): its texts would not be the target's"
        )
    if setting.repetition_penalty != 1 and engine.name != "openvino":
        return f"{engine.name} applies a repetition penalty differently from transformers"
    return None


def _check_tokens(
    engine: Engine, url: str, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> None:
    """Whether the engine reads the prompts' texts as the same ids: another tokenizer is another model."""
    for number, prompt in enumerate(prompts):
        text = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        mine = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = engine.tokenize(url, text)
        if mine != theirs:
            place = next(
                (at for at, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]),
                min(len(mine), len(theirs)),
            )
            raise ValueError(
                f"{engine.name} at {url} has another tokenizer: of prompt {number} token {place} is "
                f"{theirs[place : place + 1]} there and {mine[place : place + 1]} here, behind "
                f"{tokenizer.decode(mine[max(place - 8, 0) : place])!r}. Serve the model that was evaluated."
            )


def _verification(engine: Engine, setting: DecodingSetting, config: EngineConfig) -> str | None:
    """None where only the server's user knows how it samples drafts."""
    if setting.is_greedy or config.launch:
        return engine.verification(setting.is_greedy)
    return None


def _predicted(
    report: SpeculationReport, engine: Engine, setting: DecodingSetting, config: EngineConfig
) -> SettingResult | None:
    rule = _verification(engine, setting, config)
    return next((each for each in report.settings if (each.decoding, each.verification) == (setting, rule)), None)


def _differ(mine: Estimate, other: Estimate) -> bool:
    """Whether two estimates' intervals lie apart."""
    if None in (mine.low, mine.high, other.low, other.high):
        return False
    return mine.low > other.high or other.low > mine.high  # type: ignore[operator]


def _without_end(tokens: Sequence[int], ends: set[int | None]) -> list[int]:
    tokens = list(tokens)
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens
