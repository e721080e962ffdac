"""Speculative decoding figures as an `evaluate` metric. See the metric card, README.md."""

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
import torch
from torch.nn.utils.rnn import pad_sequence

from hf_draftkd.acceptance import AcceptanceCounts, block_efficiency_by_length

_DESCRIPTION = """
How well a draft model serves a target in speculative decoding: acceptance rate and tokens per target call, from
log-probabilities (configuration `logprobs`) or from counts of real decoding (configuration `counts`).
"""

_INPUTS = """
Configuration `logprobs` (default), one item a text that the target wrote by sampling:
    predictions: log-probability the draft gives to each token of the text (list of float).
    references: log-probability the target gives to the same tokens (list of float).
Configuration `counts`, one item a target call:
    predictions: drafted tokens that were accepted (int).
    references: tokens that were drafted (int).
Arguments of `compute`:
    num_assistant_tokens: draft lengths for `block_efficiency` (configuration `logprobs`); 5 by default.
Returns:
    acceptance_rate: configuration `logprobs`; in [0, 1].
    block_efficiency: tokens per target call by draft length, as text keys; configuration `logprobs`.
    draft_acceptance_rate, mean_acceptance_length, num_spec_steps, num_draft_tokens, num_accepted_draft_tokens:
        configuration `counts`.
"""

_CITATION = """
@inproceedings{leviathan2023fast,
  title = {Fast Inference from Transformers via Speculative Decoding},
  author = {Leviathan, Yaniv and Kalman, Matan and Matias, Yossi},
  booktitle = {International Conference on Machine Learning},
  year = {2023},
  url = {https://arxiv.org/abs/2211.17192},
}
"""

_FEATURES = {
    "logprobs": datasets.Sequence(datasets.Value("float64")),
    "counts": datasets.Value("int64"),
}
# What `counts` gives, as the metric card lists it.
_COUNTED = (
    "num_spec_steps",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
    "mean_acceptance_length",
    "draft_acceptance_rate",
)


class SpeculativeDecoding(evaluate.Metric):
    """Acceptance and block efficiency; works with `add`, `add_batch` and inside `evaluate.combine`."""

    def _info(self) -> evaluate.MetricInfo:
        name = "logprobs" if self.config_name in (None, "default") else self.config_name
        if name not in _FEATURES:
            raise ValueError(f"There is no configuration {name!r}. Choose one of: {', '.join(_FEATURES)}.")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": _FEATURES[name], "references": _FEATURES[name]}),
            reference_urls=["https://arxiv.org/abs/2211.17192", "https://arxiv.org/abs/2403.00858"],
        )

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[Any], num_assistant_tokens: int | Sequence[int] = 5
    ) -> dict[str, Any]:
        if self.config_name == "counts":
            return _from_counts(predictions, references)
        lengths = [*num_assistant_tokens] if isinstance(num_assistant_tokens, Iterable) else [num_assistant_tokens]
        return _from_logprobs(predictions, references, lengths)


def _from_logprobs(
    draft: Sequence[Sequence[float]], target: Sequence[Sequence[float]], lengths: Sequence[int]
) -> dict[str, Any]:
    for number, (of_draft, of_target) in enumerate(zip(draft, target, strict=True)):
        if len(of_draft) != len(of_target):
            raise ValueError(
                f"Text {number} has {len(of_draft)} log-probabilities of the draft and {len(of_target)} of the target. "
                "Both must score the same tokens."
            )
        if any(not value <= 1e-6 for value in (*of_draft, *of_target)):
            raise ValueError(f"Text {number} holds values above 0, or NaN: log-probabilities are expected.")
    accepted = [_accepted(*pair) for pair in zip(draft, target, strict=True) if len(pair[0])]
    if not accepted:
        raise ValueError("Every text is empty, so there is nothing to measure.")
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in accepted], batch_first=True)
    efficiency = block_efficiency_by_length(pad_sequence(accepted, batch_first=True), lengths, mask)
    return {
        # The mean of min(1, q/p) over tokens that p chose estimates Σ min(p, q) without bias.
        "acceptance_rate": float(torch.cat(accepted).mean()),
        "block_efficiency": {str(length): value for length, value in efficiency.items()},
    }


def _accepted(draft: Sequence[float], target: Sequence[float]) -> torch.Tensor:
    """The probability that each token was an accepted draft token: min(1, q/p), and 0 where q is."""
    q, p = torch.tensor(draft, dtype=torch.float64), torch.tensor(target, dtype=torch.float64)
    return torch.where(q == -torch.inf, 0.0, (q - p).clamp(max=0).exp())


def _from_counts(accepted: Sequence[int], drafted: Sequence[int]) -> dict[str, Any]:
    counts = AcceptanceCounts()
    for number, (kept, proposed) in enumerate(zip(accepted, drafted, strict=True)):
        if not 0 <= kept <= proposed:
            raise ValueError(f"Step {number} accepts {kept} of {proposed} drafted tokens, which cannot be.")
        counts.record(proposed, kept)
    return {name: value for name, value in counts.to_dict().items() if name in _COUNTED}
