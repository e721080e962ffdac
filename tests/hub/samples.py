"""A report, a training summary and the facts of a pair, with made-up numbers that only these tests see."""

import copy
from typing import Any

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.provenance import PairFacts, Provenance, TrainingSummary

TARGET = "org/target-7b"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def estimate(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "low": round(value - spread, 4), "high": round(value + spread, 4)}


def decoding(temperature: float = 0.0, **more: Any) -> dict[str, Any]:
    return DecodingSetting(temperature, **more).to_dict()


def setting(temperature: float, verification: str, alpha: float, tau: float, **more: Any) -> dict[str, Any]:
    return {
        "decoding": decoding(temperature),
        "verification": verification,
        "num_texts": 64,
        "num_tokens": 4096,
        "acceptance_rate": estimate(alpha, 0.02),
        "block_efficiency": {str(length): estimate(round(tau + length / 10, 2), 0.1) for length in (1, 3, 5)},
        **more,
    }


LATENCY = {
    "context_length": 256,
    "target_step_seconds": 0.03,
    "draft_step_seconds": 0.003,
    "verify_seconds": {"2": 0.031, "4": 0.031, "6": 0.032},
    "relative_cost": 0.1,
}
_REPORT = {
    "schema_version": 1,
    "target": {"name": TARGET, "revision": REVISION, "num_parameters": 7_000_000_000},
    "draft": {"name": "org/draft", "revision": "f" * 40, "num_parameters": 115_000_000},
    "prompts": {"source": "org/prompts", "count": 64, "domain": "function calling", "sha256": "ab" * 32},
    "hardware": {"device": "cuda", "name": "NVIDIA H100", "num_devices": 1, "num_threads": 16, "dtype": "bfloat16"},
    "num_assistant_tokens": 5,
    "max_new_tokens": 64,
    "versions": {"transformers": "5.23.0", "torch": "2.13.0"},
    "settings": [
        setting(
            0.0,
            "greedy_draft",
            0.71,
            2.0,
            assisted={
                "num_assistant_tokens": 5,
                "num_prompts": 64,
                "num_tokens": 2232,
                "num_spec_steps": 900,
                "acceptance_histogram": [300, 0, 0, 0, 0, 600],
                "num_draft_tokens": 4500,
                "num_accepted_draft_tokens": 3000,
                "mean_acceptance_length": 2.48,
                "draft_acceptance_rate": 0.66,
                "tokens_per_second": 61.5,
                "plain_tokens_per_second": 33.25,
                "speedup": estimate(1.85, 0.06),
            },
            speculative={
                "num_assistant_tokens": 5,
                "num_prompts": 64,
                "num_tokens": 2232,
                "num_spec_steps": 900,
                "acceptance_histogram": [300, 0, 0, 0, 0, 600],
                "num_draft_tokens": 4500,
                "num_accepted_draft_tokens": 3000,
                "mean_acceptance_length": 2.48,
                "draft_acceptance_rate": 0.66,
                "tokens_per_second": 71.5,
                "plain_tokens_per_second": 33.25,
                "speedup": estimate(2.15, 0.06),
                "share_of_limit": 0.93,
            },
            recommendation={
                "worth_it": True,
                "num_assistant_tokens": 5,
                "predicted_speedup": 1.9,
                "break_even_acceptance_rate": 0.31,
                "reason": "Acceptance is far above break-even.",
            },
        ),
        setting(1.0, "rejection_sampling", 0.62, 1.7),
    ],
    "latency": LATENCY,
    "recommendation": {
        "worth_it": True,
        "num_assistant_tokens": 5,
        "predicted_speedup": 1.9,
        "break_even_acceptance_rate": 0.31,
        "reason": "Acceptance is far above break-even.",
    },
    "baseline": {
        "draft": {"name": "org/stock-draft", "revision": "e" * 40, "num_parameters": 115_000_000},
        "settings": [setting(0.0, "greedy_draft", 0.5, 1.4), setting(1.0, "rejection_sampling", 0.45, 1.2)],
        "latency": LATENCY,
    },
    "paired_difference": [
        {
            "decoding": decoding(0.0),
            "verification": "greedy_draft",
            "acceptance_rate": estimate(0.21, 0.01),
            "block_efficiency": {"5": estimate(0.6, 0.05)},
        },
        {
            "decoding": decoding(1.0),
            "verification": "rejection_sampling",
            "acceptance_rate": estimate(0.17, 0.01),
            "block_efficiency": {"5": estimate(0.5, 0.05)},
        },
    ],
}


def report(**changes: Any) -> dict[str, Any]:
    """A whole report; `changes` replace top-level keys, None removes one."""
    merged = copy.deepcopy(_REPORT) | changes
    return {key: value for key, value in merged.items() if value is not None}


def checked_report(**changes: Any) -> SpeculationReport:
    return SpeculationReport.from_dict(report(**changes))


def training(**changes: Any) -> TrainingSummary:
    values: dict[str, Any] = {
        "target": TARGET,
        "target_revision": REVISION,
        "draft": "org/stock-draft",
        "draft_revision": "e" * 40,
        "signal": "white_box",
        "divergence": "forward_kl",
        "loss_temperature": 1.0,
        "completions": "target",
        "dataset": "org/alignment-data",
        "scenarios": ["queries"],
        "num_rows": 2000,
        "num_tokens": 250_000,
        "sampling": [DecodingSetting(), DecodingSetting(1.0, top_p=0.95)],
        "num_steps": 500,
        "hyperparameters": {"learning_rate": 5e-4, "max_length": 2048},
    }
    return TrainingSummary(**(values | changes))


def pair(**changes: Any) -> PairFacts:
    values: dict[str, Any] = {
        "draft_vocab_size": 32000,
        "target_vocab_size": 32000,
        "same_special_ids": True,
        "draft_parameters": 115_000_000,
        "target_parameters": 7_000_000_000,
        "tokenizer_fingerprint": "cd" * 32,
        "has_chat_template": True,
        "num_assistant_tokens": 5,
    }
    return PairFacts(**(values | changes))


def provenance(**changes: Any) -> Provenance:
    values: dict[str, Any] = {
        "command": "draftkd train --model org/stock-draft --target_model org/target-7b",
        "created": "2026-11-21T02:00:00+00:00",
        "versions": {"hf_draftkd": "0.1.0", "transformers": "5.23.0"},
        "commit": "9" * 40,
        "hardware": "1 NVIDIA H100",
    }
    return Provenance(**(values | changes))
