"""The report: every number that says whether a draft is worth using, with every key documented where it is defined.

`SpeculationReport` is what `evaluate_draft` returns, what `report.json` holds and what a model card is made from. A
number that was not measured is absent from the JSON, never null. Shares and rates lie in 0…1, times are seconds.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_draftkd.acceptance import Estimate
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.schema import from_plain, key, optional, read_json, to_plain
from hf_draftkd.utils.files import write_text

SCHEMA_VERSION = 1


@dataclass(kw_only=True)
class ModelInfo:
    """Which model was measured."""

    name: str = key("Hub id or path the model was loaded from.")
    is_local: bool | None = optional(
        "Whether `name` was a folder where it was measured: `models/draft` may also be an id on the Hub."
    )
    revision: str | None = optional("Commit on the Hub; absent for a local path.")
    num_parameters: int = key("Parameters, tied weights counted once.")
    dtype: str | None = optional("Number format of the weights that were measured.")
    weights_sha256: str | None = optional(
        "For a draft: checksum of the weights that were measured, as `hf_draftkd.models.identity.weights_checksum` of "
        "their folder gives it in this number format. `push` compares it. Absent for quantised weights."
    )


@dataclass(kw_only=True)
class PromptInfo:
    """Which prompts were answered."""

    source: str = key("Dataset id, file, or `given` for prompts passed in Python.")
    is_local: bool | None = optional("Whether `source` was a file or folder where it was measured.")
    count: int = key("Number of prompts.")
    domain: str | None = optional("What the prompts are about, where the user said so.")
    sha256: str = key("Hash of the prompts' contents, in order: equal hashes are the same prompts.")


@dataclass(kw_only=True)
class HardwareInfo:
    """Where it was measured."""

    device: str = key("`cpu`, `cuda`, `mps`, ...")
    name: str = key("The processor's or accelerator's own name.")
    num_devices: int = key("Devices the target is spread over.", default=1)
    num_threads: int = key("Threads torch used on the CPU.")
    dtype: str = key("Number format of the target's weights.")


@dataclass(kw_only=True)
class Recommendation:
    """Use this draft or not, with which draft length, and in which way of decoding in transformers."""

    worth_it: bool = key("Whether decoding with the draft is expected to be faster than plain decoding.")
    num_assistant_tokens: int = key("Draft length with the highest predicted speed-up on the measured machine.")
    way: str | None = optional(
        "The faster way of decoding there: `SpeculativeDecoding` (`custom_generate=`), the same `in parallel` (one "
        "pass of the draft a round), or `assistant_model=`."
    )
    predicted_speedup: float = key("Predicted tokens/s at that length ÷ plain tokens/s.")
    break_even_acceptance_rate: float | None = optional(
        "Acceptance rate at which the best draft length would just reach the speed of plain decoding. Absent where no "
        "acceptance rate is enough."
    )
    reason: str = key("The same in one sentence.")


@dataclass(kw_only=True)
class DecodingDifference:
    """Where greedy decoding with the draft first wrote another token than plain decoding."""

    prompt: int = key("Index of the prompt.")
    position: int = key("Index in the completion of the first token that differs.")
    plain_token: int = key("Token id that plain decoding wrote.")
    assisted_token: int = key("Token id that decoding with the draft wrote.")
    logit_gap: float = key(
        "Target logit of the plain token minus that of the assisted one, both processed, from one plain forward pass. "
        "Near 0: a tie that rounding decides. Clearly positive: a fault."
    )


@dataclass(kw_only=True)
class AssistedResult:
    """Counts and wall-clock of real decoding with the draft, in one way; counters as in vLLM."""

    num_assistant_tokens: int = key("Draft length γ, fixed.")
    num_prompts: int = key("Prompts decoded plainly and with the draft.")
    num_spec_steps: int = key("Target calls.")
    num_draft_tokens: int = key("Tokens proposed by the draft.")
    num_accepted_draft_tokens: int = key("Proposed tokens that stayed in the text.")
    num_tokens: int = key("Tokens written, the target's own included.")
    mean_acceptance_length: float = key("Tokens written per target call: the counted block efficiency.")
    draft_acceptance_rate: float | None = optional("Accepted ÷ drafted tokens. Absent where nothing was drafted.")
    acceptance_histogram: list[int] = key("Target calls that accepted 0, 1, 2, ... drafted tokens.")
    tokens_per_second: float = key("Decoding with the draft, prompt reading included.")
    plain_tokens_per_second: float = key("Plain decoding of the same prompts in the same run.")
    speedup: Estimate = key(
        "Measured tokens/s with the draft ÷ tokens/s plain, sums over prompts; interval over prompts."
    )
    predicted_speedup: float | None = optional(
        "What block efficiency and measured step times predict for this draft length, the overhead of this way "
        "included. Absent in batches."
    )
    share_of_limit: float | None = optional(
        "Measured speed-up ÷ τ·t ÷ (γ·t_draft + t_verify), which forward passes alone would allow at this draft length "
        "(τ the block efficiency). Absent in batches."
    )
    num_identical: int | None = optional("Greedy only: prompts whose text with the draft equals the plain one.")
    differences: list[DecodingDifference] | None = optional(
        "Greedy only: the first difference of every prompt that has one; absent where all are equal."
    )


@dataclass(kw_only=True)
class GenerateOverhead:
    """Time that decoding spends outside the forward passes, measured beside them."""

    plain_step_seconds: float = key("Per token of plain decoding.")
    draft_step_seconds: float = key("Per drafted token.")
    block_seconds: float = key("Per target call of decoding with the draft.")


@dataclass(kw_only=True)
class LatencyResult:
    """Wall-clock of single forward passes with a filled cache: the 20th percentile, as on an idle machine."""

    context_length: int = key("Tokens in the cache while measuring.")
    target_step_seconds: float = key("One token through the target.")
    draft_step_seconds: float = key("One token through the draft.")
    verify_seconds: dict[int, float] = key("n tokens at once through the target, by n = γ + 1.")
    relative_cost: float = key("Draft step ÷ target step.")
    listed_draft_seconds: dict[int, float] | None = optional(
        "Where the draft records a `draft_vocabulary`: one token through the draft with its head cut to the first n "
        "ids of the list, by n. `SpeculativeDecoding` has the largest."
    )
    generate_overhead: GenerateOverhead | None = optional(
        "What `generate(assistant_model=...)` adds to the forward passes."
    )
    speculative_overhead: GenerateOverhead | None = optional(
        "What `SpeculativeDecoding` adds to the forward passes; `plain_step_seconds` is that of plain `generate`."
    )
    parallel_draft_seconds: dict[int, float] | None = optional(
        "One pass of a parallel draft by the tokens γ that it drafts: over γ + 1 tokens, two of them of the text and γ "
        "- 1 mask tokens; with its head cut to its list where it records one."
    )
    parallel_overhead: GenerateOverhead | None = optional(
        "What `SpeculativeDecoding` adds to the forward passes when it drafts in one pass."
    )


@dataclass(kw_only=True)
class VocabularyResult:
    """The same texts, had the draft proposed only the first `size` ids of the list in its generation config."""

    size: int = key("Tokens that the draft proposes; the last entry is the whole vocabulary.")
    acceptance_rate: Estimate = key("As the setting's.")
    block_efficiency: dict[int, Estimate] | None = optional("As the setting's.")
    parallel_block_efficiency: dict[int, Estimate] | None = optional("As in `parallel`.")
    num_assistant_tokens: int | None = optional("Draft length with the highest predicted speed-up.")
    predicted_speedup: float | None = optional(
        "Predicted tokens/s of `SpeculativeDecoding` at that length ÷ plain tokens/s."
    )


@dataclass(kw_only=True)
class ParallelResult:
    """The same texts with all tokens of a block drafted in one pass of the draft, from mask tokens."""

    num_tokens: int = key("Tokens that the draft was trained to predict in one pass.")
    acceptance_by_depth: list[Estimate] = key(
        "Expected acceptance of a token that is drafted 1st, 2nd, ... in its block, averaged over all tokens that can "
        "be. At depth 1 it is that of an ordinary draft."
    )
    block_efficiency: dict[int, Estimate] = key("As the setting's, for as many draft tokens as it predicts.")
    speculative: AssistedResult | None = optional(
        "Real decoding with `SpeculativeDecoding(draft)`, one pass of the draft a round, at the draft length that "
        "suits it best."
    )


@dataclass(kw_only=True)
class KindResult:
    """The tokens of one kind."""

    acceptance_rate: Estimate = key("Chance that such a token of the text had been an accepted draft token.")
    num_tokens: int = key("How many there are in the texts.")


@dataclass(kw_only=True)
class Answer:
    """One of the texts, token by token."""

    decoding: DecodingSetting = key("As in the setting.")
    verification: str = key("As in the setting.")
    prompt: str = key("The prompt as text, without special tokens; a long one is cut in front.")
    tokens: list[str] = key("Text of each completion token; a long completion is cut at the end.")
    accepted: list[float] = key("Chance that the token in the text had been an accepted draft token.")
    proposed: dict[int, str] = key("Where it is another token: the draft's likeliest, by index.")


@dataclass(kw_only=True)
class SettingResult:
    """Results under one decoding setting and one verification rule."""

    decoding: DecodingSetting = key("How the texts were decoded; applied to target and draft alike.")
    verification: str = key(
        "`rejection_sampling` (transformers when sampling), `greedy_draft` (vLLM's default draft), `exact_match` "
        "(greedy decoding everywhere, llama.cpp), `top_10_draft` (llama.cpp where its draft samples)."
    )
    num_texts: int = key("Texts measured.")
    num_tokens: int = key("Completion tokens measured.")
    acceptance_rate: Estimate = key("Expected acceptance of one drafted token, averaged over tokens.")
    block_efficiency: dict[int, Estimate] | None = optional(
        "Tokens per target call by draft length, bonus token included. Absent where the target did not write the text "
        "under this very setting."
    )
    acceptance_by_position: list[float] | None = optional(
        "Chance that a step accepts its 1st, 2nd, ... drafted token (all before it included), at the report's "
        "`num_assistant_tokens`."
    )
    acceptance_by_place: dict[int, Estimate] | None = optional(
        "Acceptance of tokens by their place in the answer, counted from 1: places 1, 2 to 3, 4 to 7, 8 to 15, ..., by "
        "the first of them."
    )
    acceptance_by_kind: dict[str, KindResult] | None = optional(
        "Acceptance by kind of token: `word`, `rest of a word`, `number`, `punctuation`, `white space`, `special`."
    )
    mbsu: dict[int, float] | None = optional(
        "Memory-bound speed-up by draft length: block efficiency ÷ (cγ + 1), c = draft ÷ target parameters."
    )
    transformers_block_efficiency: dict[int, Estimate] | None = optional(
        "Block efficiency of transformers' own `generate`, where it differs: it warps the draft's distribution twice "
        "(temperature, top-p), the target's once."
    )
    draft_vocabulary: list[VocabularyResult] | None = optional(
        "Where the draft records a `draft_vocabulary`: the results by its size, the smallest first; the last is the "
        "whole vocabulary, the one before it the whole list, which `SpeculativeDecoding` has. All other results but "
        "what it measured are those of the whole vocabulary."
    )
    parallel: ParallelResult | None = optional(
        "For a draft trained with `parallel_tokens`: drafting in one pass. All other results are those of drafting one "
        "token at a time."
    )
    assisted: AssistedResult | None = optional(
        "Real decoding under this setting with `generate(assistant_model=draft)`, transformers' own loop."
    )
    speculative: AssistedResult | None = optional(
        "The same prompts in the same run with `generate(custom_generate=SpeculativeDecoding(draft))`."
    )
    speculative_batches: dict[int, AssistedResult] | None = optional(
        "`SpeculativeDecoding` on batches beside plain batches, by batch size; `assistant_model=` takes none."
    )
    recommendation: Recommendation | None = optional("For this setting.")

    @property
    def words(self) -> str:
        """Decoding and verification: "temperature 1, top-p 0.9, greedy draft".

        A rule that is transformers' own is what a bare temperature means.
        """
        rule = "" if self.is_transformers_rule else f", {self.verification.replace('_', ' ')}"
        return f"{self.decoding}{rule}"

    @property
    def of_list(self) -> VocabularyResult | None:
        """The results with the draft's recorded list of tokens, as `SpeculativeDecoding` has them."""
        return self.draft_vocabulary[-2] if self.draft_vocabulary else None

    @property
    def is_transformers_rule(self) -> bool:
        """Whether transformers' `generate` verifies drafts by this entry's rule."""
        return self.verification == ("exact_match" if self.decoding.is_greedy else "rejection_sampling")


@dataclass(kw_only=True)
class PairedDifference:
    """Draft minus baseline on the same texts, one entry per entry of `settings`."""

    decoding: DecodingSetting = key("As in the setting.")
    verification: str = key("As in the setting.")
    acceptance_rate: Estimate = key("Difference of acceptance rates.")
    block_efficiency: dict[int, Estimate] | None = optional("Difference of block efficiencies by draft length.")
    parallel_block_efficiency: dict[int, Estimate] | None = optional("The same in one pass, of two parallel drafts.")


@dataclass(kw_only=True)
class EngineResult:
    """An engine that really served the pair, under one decoding setting, beside what was predicted of it."""

    engine: str = key("`llama.cpp`, `vllm` or `openvino`.")
    version: str = key("As the server says it.")
    flags: str | None = optional("The command that served the pair; absent where its user started it.")
    threads: int | None = optional("CPU threads given to it; absent where its user started it.")
    hardware: str | None = optional("The machine's processor; absent where a server's user started it.")
    decoding: DecodingSetting = key("How it decoded.")
    verification: str | None = optional(
        "The rule by which it accepts drafted tokens; absent where its user started it to sample."
    )
    num_assistant_tokens: int = key("Draft length γ.")
    num_prompts: int = key("Prompts decoded with the draft, and plainly where there is a server for that.")
    num_rounds: int = key("Times each of them was, in turns.")
    num_identical: int | None = optional(
        "Greedy only: prompts whose text with the draft, in every round, equals the target's own in transformers."
    )
    num_plain_identical: int | None = optional("Greedy only: the same without the draft.")
    num_spec_steps: int = key("Target calls, those that read the prompts left out.")
    num_draft_tokens: int = key("Tokens proposed by the draft.")
    num_accepted_draft_tokens: int = key("Proposed tokens that were accepted.")
    mean_acceptance_length: Estimate = key("Tokens written per target call, the prompt's call and its token left out.")
    predicted_mean_acceptance_length: Estimate | None = optional(
        "Block efficiency at this draft length, computed from the target's own texts. Absent without the rule."
    )
    draft_acceptance_rate: float = key("Accepted ÷ drafted tokens, counted.")
    predicted_draft_acceptance_rate: float | None = optional("(block efficiency - 1) ÷ γ.")
    tokens_per_second: float = key("With the draft, prompt reading included.")
    call_seconds: dict[int, float] = key("Drafting and one target call in this engine, by draft length.")
    plain_tokens_per_second: float | None = optional(
        "Plain, in the same rounds; absent, as what follows, where no server decoded plainly."
    )
    speedup: Estimate | None = optional("Tokens/s with the draft ÷ tokens/s plain; interval over prompts.")
    target_step_seconds: float | None = optional("One token of plain decoding in this engine, after the prompt.")
    recommendation: Recommendation | None = optional("For this engine, this machine and this setting.")


@dataclass(kw_only=True)
class DraftResult:
    """A draft's own part of a report: the baseline, or one of several."""

    draft: ModelInfo = key("The draft.")
    settings: list[SettingResult] = key("As the report's.")
    latency: LatencyResult | None = optional("As the report's.")
    recommendation: Recommendation | None = optional("As the report's.")
    paired_difference: list[PairedDifference] | None = optional(
        "Where there are several drafts: this one minus the first of the ranking."
    )


@dataclass(kw_only=True)
class Comparison:
    """One computed number beside the counted one."""

    decoding: DecodingSetting = key("As in the setting.")
    num_assistant_tokens: int = key("Draft length γ.")
    computed: Estimate = key("Block efficiency from one pass over the text plain decoding wrote.")
    counted: Estimate = key("Tokens per target call of real decoding with the draft.")
    agree: bool = key(
        "Greedy: equal to the last digit. Sampled: the intervals (99% here) overlap, with what few texts may miss."
    )
    way: str = key("What decoded: `assistant_model=` or `SpeculativeDecoding`.", default="assistant_model=")


@dataclass(kw_only=True)
class SelfCheck:
    """Computed block efficiency against real decoding, on a few prompts."""

    prompts: int = key("Prompts checked.")
    equal: bool = key("Whether every comparison agrees.")
    comparisons: list[Comparison] = key("One entry per setting and draft length.", default_factory=list)


@dataclass(kw_only=True)
class SpeculationReport:
    """Everything measured about a draft under a target.

    [`evaluate_draft`] makes it. `report.recommendation.reason` is the verdict in words (there is none without speed),
    `rich.print(ReportTable(report))` shows the table, `report.save(path)` and `SpeculationReport.load(path)` are for
    files. What was not measured is None here and absent from the file.
    """

    schema_version: int = key("Version of this format.", default=SCHEMA_VERSION)
    target: ModelInfo = key("The target.")
    draft: ModelInfo = key("The draft.")
    prompts: PromptInfo = key("The prompts.")
    hardware: HardwareInfo = key("The machine.")
    versions: dict[str, str] = key("Versions of Python and of the libraries involved.")
    num_assistant_tokens: int = key("Draft length γ the user asked about.")
    max_new_tokens: int = key("Longest completion measured, in tokens.")
    settings: list[SettingResult] = key("One entry per decoding setting and verification rule.")
    latency: LatencyResult | None = optional("Step times on this machine.")
    recommendation: Recommendation | None = optional("Overall: the setting where the draft helps least decides.")
    baseline: DraftResult | None = optional("The draft compared against, usually the stock one.")
    paired_difference: list[PairedDifference] | None = optional("Draft minus baseline.")
    warnings: list[str] = key("What a reader must know before trusting a number.", default_factory=list)
    engines: list[EngineResult] | None = optional("Engines that served the pair, by engine and setting.")
    groups: dict[str, list[SettingResult]] | None = optional("The settings again, by domain or category.")
    drafts: list[DraftResult] | None = optional("Several drafts, the best first.")
    self_check: SelfCheck | None = optional("Computed numbers against counted ones.")
    answers: list[Answer] | None = optional(
        "A few texts, ordered from the least to the best predicted. They are published with the report."
    )

    def to_dict(self) -> dict[str, Any]:
        """Plain data as `report.json` holds it."""
        return to_plain(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON; a reader never sees half a file."""
        return write_text(Path(path), self.to_json())

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "report") -> "SpeculationReport":
        """Read plain data, checking every key.

        Raises:
            ValueError: The data is of another schema version, or a key is missing, unknown or of the wrong type.
        """
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            found = "no `schema_version`" if version is None else f"schema_version {version!r}"
            raise ValueError(
                f"`{where}` has {found}, this version of hf_draftkd reads {SCHEMA_VERSION}. Make the report again "
                "with `draftkd evaluate`, or read it with the version of hf_draftkd named in its `versions`."
            )
        return from_plain(cls, data, where)

    @classmethod
    def from_json(cls, text: str) -> "SpeculationReport":
        """Read `to_json()`'s text.

        Raises:
            ValueError: Not JSON, or as `from_dict`.
        """
        return cls.from_dict(read_json(text, "report"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SpeculationReport":
        """Read a `report.json`.

        Raises:
            ValueError: There is no such file, or as `from_json`.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"There is no report at {str(path)!r}. `draftkd evaluate` writes one to OUT/report.json.")
        return cls.from_dict(read_json(path.read_bytes(), path.name), where=path.name)
