"""What to measure, and how: one config for `evaluate_draft` and for `draftkd evaluate`."""

from dataclasses import dataclass

from hf_draftkd.acceptance import DRAFT_LENGTHS, VERIFICATION_RULES
from hf_draftkd.decoding.setting import DecodingSetting, settings_at
from hf_draftkd.utils.checks import one_of, whole_number
from hf_draftkd.utils.fields import option


@dataclass
class EvaluationConfig:
    """Configuration class for [`evaluate_draft`]; every field is an option of `draftkd evaluate`.

    The help text of a field says what it does. Greedy text is always verified exactly. Real decoding verifies by
    rejection sampling: sampled settings are timed where `verification` names that rule, and the overall recommendation
    is about it.

    Raises:
        ValueError: A value is out of range, a rule does not exist, or `top_p` or `top_k` is to change greedy decoding.
    """

    temperatures: list[float] | None = option(
        None, "Sampling temperatures, 0 for greedy; by default 0 and 1, or what alignment data records."
    )
    top_p: float = option(1.0, "Nucleus sampling at temperatures above 0.")
    top_k: int = option(0, "Top-k sampling at temperatures above 0; 0 keeps every token.")
    repetition_penalty: float | None = option(
        None, "Applied to both models; by default that of the target's generation config."
    )
    verification: list[str] = option(
        ["rejection_sampling"],
        "Rules for sampled text: rejection_sampling, greedy_draft (vLLM), exact_match (llama.cpp), top_10_draft "
        "(llama.cpp where its draft samples).",
    )
    max_new_tokens: int = option(
        128, "Longest completion, in tokens; of alignment data the longest completion counts instead."
    )
    num_assistant_tokens: int | None = option(
        None,
        "Draft length to decode with and to report acceptance by position for; by default decoding uses the best one "
        "found, and positions are reported for 5.",
    )
    measure_speed: bool = option(True, "Time steps and real decoding, and recommend.")
    num_speed_prompts: int = option(16, "Prompts decoded in every way, in turns, for each setting.")
    speed_batch_sizes: list[int] = option(
        [], "Also time SpeculativeDecoding on batches of these sizes, beside plain batches."
    )
    draft_vocabulary_sizes: list[int] | None = option(
        None, "Sizes of the list that `draftkd vocabulary` recorded to report; by default all of it, 1/2 and 1/4."
    )
    verify: int = option(0, "Prompts on which to check computed against counted numbers; 0 for no check.")
    batch_size: int = option(8, "Texts per forward pass.")
    seed: int = option(0, "Seed of the target's sampling.")
    num_answers: int = option(
        0, "Answers to show token by token. Their text, and that of their prompts, is then part of the report."
    )
    domain: str | None = option(None, "What the prompts are about, for the report.")

    def __post_init__(self) -> None:
        """Check every value that can be checked without the models."""
        if not self.verification:
            raise ValueError("`verification` is empty: name at least one rule, such as rejection_sampling.")
        if isinstance(self.verification, str):
            raise ValueError(f"`verification` must be a list of rules, got the string {self.verification!r}.")
        for rule in self.verification:
            one_of("verification rule", rule, VERIFICATION_RULES)
        if len(set(self.verification)) < len(self.verification):
            raise ValueError(f"`verification` names a rule twice: {', '.join(self.verification)}.")
        for name in ("max_new_tokens", "num_speed_prompts", "batch_size"):
            whole_number(name, getattr(self, name))
        whole_number("verify", self.verify, 0)
        whole_number("num_answers", self.num_answers, 0, 20)
        for size in self.speed_batch_sizes:
            if whole_number("speed_batch_sizes", size, 2) > self.num_speed_prompts:
                raise ValueError(
                    f"`speed_batch_sizes` names {size}, but only {self.num_speed_prompts} prompts are timed. Raise "
                    "`num_speed_prompts` to at least that."
                )
        if self.num_assistant_tokens is not None:
            whole_number("num_assistant_tokens", self.num_assistant_tokens, DRAFT_LENGTHS[0], DRAFT_LENGTHS[-1])
        if all(setting.is_greedy for setting in self.settings()) and (self.top_p < 1 or self.top_k > 0):
            raise ValueError(
                "Temperature 0 is greedy decoding, which `top_p` and `top_k` cannot change. Leave them out, or give a "
                "temperature above 0."
            )

    def settings(self, own_penalty: float = 1.0) -> list[DecodingSetting]:
        """One setting per temperature.

        Args:
            own_penalty: The target's own repetition penalty, used where the config names none.
        """
        penalty = own_penalty if self.repetition_penalty is None else self.repetition_penalty
        temperatures = (0.0, 1.0) if self.temperatures is None else self.temperatures
        return settings_at(temperatures, top_p=self.top_p, top_k=self.top_k, repetition_penalty=penalty)
