"""A small report, complete but for what needs a machine, for tests that only read one."""

from hf_draftkd.acceptance import Estimate
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.report import (
    Answer,
    AssistedResult,
    DraftResult,
    GenerateOverhead,
    HardwareInfo,
    KindResult,
    LatencyResult,
    ModelInfo,
    PairedDifference,
    PromptInfo,
    Recommendation,
    SettingResult,
    SpeculationReport,
)

LENGTHS = range(1, 17)


def latency(target=10e-3, draft=1e-3, verify=11e-3, overhead=None):
    return LatencyResult(
        context_length=64,
        target_step_seconds=target,
        draft_step_seconds=draft,
        verify_seconds={length + 1: verify for length in LENGTHS},
        relative_cost=draft / target,
        generate_overhead=overhead,
    )


def setting(rate=0.7, temperature=0.0, **more):
    """Figures of a draft whose tokens are accepted independently with `rate`."""
    efficiency = {length: sum(rate**power for power in range(length + 1)) for length in LENGTHS}
    return SettingResult(
        decoding=DecodingSetting(temperature),
        verification="exact_match" if temperature == 0 else "rejection_sampling",
        num_texts=40,
        num_tokens=2000,
        acceptance_rate=Estimate(rate, rate - 0.02, rate + 0.02),
        block_efficiency={length: Estimate(value, value - 0.1, value + 0.1) for length, value in efficiency.items()},
        acceptance_by_position=[rate**place for place in range(1, 6)],
        acceptance_by_place={place: Estimate(rate, rate - 0.1, rate + 0.1) for place in (1, 2, 4, 8)},
        acceptance_by_kind={
            kind: KindResult(acceptance_rate=Estimate(rate, rate - 0.1, rate + 0.1), num_tokens=900)
            for kind in ("word", "number")
        },
        mbsu={length: value / (0.1 * length + 1) for length, value in efficiency.items()},
        **more,
    )


def assisted(speedup=1.5, num_assistant_tokens=4):
    return AssistedResult(
        num_assistant_tokens=num_assistant_tokens,
        num_prompts=16,
        num_spec_steps=100,
        num_draft_tokens=400,
        num_accepted_draft_tokens=200,
        num_tokens=300,
        mean_acceptance_length=3.0,
        draft_acceptance_rate=0.5,
        acceptance_histogram=[30, 20, 10, 10, 30],
        tokens_per_second=150.0,
        plain_tokens_per_second=100.0,
        speedup=Estimate(speedup, speedup - 0.1, speedup + 0.1),
        predicted_speedup=speedup + 0.05,
        share_of_limit=0.8,
    )


def report():
    stock = DraftResult(
        draft=ModelInfo(name="org/stock", num_parameters=1000),
        settings=[setting(0.4), setting(0.5, 1.0)],
        latency=latency(),
    )
    recommendation = Recommendation(
        worth_it=True, num_assistant_tokens=4, predicted_speedup=1.6, break_even_acceptance_rate=0.3, reason="Worth it."
    )
    return SpeculationReport(
        target=ModelInfo(name="org/target", revision="abc", num_parameters=10_000),
        draft=ModelInfo(name="local/distilled", num_parameters=1000),
        prompts=PromptInfo(source="test.jsonl", count=40, domain="function calling", sha256="0" * 64),
        hardware=HardwareInfo(device="cpu", name="A <fast> & loud CPU", num_threads=2, dtype="float32"),
        versions={"python": "3.11", "transformers": "5.23.0"},
        num_assistant_tokens=5,
        max_new_tokens=64,
        settings=[
            setting(0.7, assisted=assisted(), speculative=assisted(1.7), recommendation=recommendation),
            setting(0.6, 1.0, assisted=assisted(1.3), speculative=assisted(1.4), recommendation=recommendation),
        ],
        latency=latency(
            overhead=GenerateOverhead(plain_step_seconds=1e-4, draft_step_seconds=1e-4, block_seconds=1e-3)
        ),
        recommendation=recommendation,
        baseline=stock,
        paired_difference=[
            PairedDifference(
                decoding=DecodingSetting(temperature),
                verification="exact_match" if temperature == 0 else "rejection_sampling",
                acceptance_rate=Estimate(0.3, 0.25, 0.35),
                block_efficiency={length: Estimate(0.8, 0.6, 1.0) for length in LENGTHS},
            )
            for temperature in (0.0, 1.0)
        ],
        warnings=["Only 12 prompts <script>alert(1)</script>"],
        answers=[
            Answer(
                decoding=DecodingSetting(0.0),
                verification="exact_match",
                prompt="A <question>?",
                tokens=["The", "<b>", " end", "\n"],
                accepted=[1.0, 1.0, 0.0, 1.0],
                proposed={2: " fin"},
            )
        ],
        groups={"maths": [setting(0.8)], "prose": [setting(0.5)]},
    )
