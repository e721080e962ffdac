"""One served request: what `generate(assistant_model=...)` did, and the target's distribution at every token it wrote.

The target computed a distribution for each token of the text while it checked the draft. They are taken where they
arise, call by call, and cut to the k likeliest tokens at once, so that learning needs no further pass of the target and
`[tokens, vocabulary]` is never held. (`generate(output_logits=True)` returns the same rows, but holds all of them in
float32 until the text ends, with those of rejected tokens beside them.)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_draftkd.acceptance import AcceptanceCounts
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.assisted import AssistedStep, observe_steps
from hf_draftkd.losses import SparseTarget, top_k_target
from hf_draftkd.models.forward import unwrapped
from hf_draftkd.utils.hashing import hash_number


@dataclass(frozen=True)
class ServedRequest:
    """A request to learn from.

    Args:
        prompt_ids: [P] int64.
        completion_ids: [T] int64, what the target wrote.
        target: Its distributions [T, k] at these tokens, unprocessed but for the loss temperature.
        setting: How it was decoded; None where that cannot be written as a `DecodingSetting`.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    target: SparseTarget
    setting: DecodingSetting | None

    def is_held_out(self, share: float, seed: int) -> bool:
        """Whether its prompt belongs to the share of prompts that is never learnt from."""
        return hash_number(f"{seed}:{self.prompt_ids.tolist()}") < share * 2**64


@dataclass
class Served:
    """What is known about a request after `serving` has ended.

    Attributes:
        counts: Drafted and accepted tokens.
        parts: The target's distributions, one part per target call.
    """

    counts: AcceptanceCounts = field(default_factory=AcceptanceCounts)
    parts: list[SparseTarget] = field(default_factory=list)

    def target(self, num_tokens: int) -> SparseTarget:
        """The distributions of the first tokens written, on the CPU."""
        kept = SparseTarget.concatenate(self.parts)[:num_tokens]
        # int32 takes half the bytes of int64; no vocabulary has more than 2**31 tokens.
        return SparseTarget(kept.token_ids.int().cpu(), kept.logprobs.cpu(), kept.tail_logprob.cpu())


@contextmanager
def serving(target_model: PreTrainedModel, *, top_k: int, loss_temperature: float, vocab_size: int) -> Iterator[Served]:
    """Count, and keep the target's distributions, around one assisted `generate` call. The output is untouched.

    Args:
        target_model: The model whose `generate` is called, wrapped or not.
        top_k: Likeliest tokens to keep, at most `vocab_size`.
        loss_temperature: Of what is kept.
        vocab_size: Tokens that draft and target share.

    Yields:
        Counts and distributions, complete when the call has returned.

    Raises:
        ValueError: The target's calls are being counted already, as by `count_acceptance`.
    """
    served = Served()
    logits: Tensor | None = None

    def hold(module: Any, args: Any, output: Any) -> None:
        nonlocal logits
        # A copy: `generate` applies temperature and top-p to these very numbers where they are float32 already.
        logits = output.logits.detach().clone()

    def keep(step: AssistedStep) -> None:
        nonlocal logits
        assert logits is not None, "the target has verified this step"
        served.counts.record(step.num_draft_tokens, step.num_accepted_tokens, step.num_new_tokens)
        # The logits end with one row for each drafted token and one more; the first of these chose the new tokens.
        rows = logits[0, -(step.num_draft_tokens + 1) :][: step.num_new_tokens, :vocab_size]
        served.parts.append(top_k_target(rows, top_k, loss_temperature))
        logits = None

    with observe_steps(target_model, keep):
        handle = unwrapped(target_model).register_forward_hook(hold)
        try:
            yield served
        finally:
            handle.remove()


def served_setting(config: GenerationConfig, kwargs: Mapping[str, Any]) -> DecodingSetting | None:
    """How `generate` decodes with this config and these arguments.

    Returns:
        The setting; None where temperature, top-k, top-p and repetition penalty do not describe it.
    """
    if kwargs.get("logits_processor") or kwargs.get("prefix_allowed_tokens_fn"):
        return None
    try:
        return DecodingSetting.from_generation_config(config)
    except ValueError:
        return None


def prompt_of(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[P] the tokens of a request [1, L] that are not padding."""
    ids = input_ids[0]
    return ids.cpu() if attention_mask is None else ids[attention_mask[0].bool()].cpu()
