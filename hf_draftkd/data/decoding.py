"""How a text was decoded: the one description of a sampling setting that generation and evaluation share.

Block efficiency holds only for text that the target wrote under the very setting being reported, so a setting is
recorded with every row and compared as a value.
"""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class DecodingSetting:
    """One way of choosing the next token.

    Args:
        temperature: 0 is greedy decoding; 1 samples from the model's own distribution.
        top_p: Smallest probability mass kept by nucleus sampling; 1 keeps everything.
        top_k: Number of likeliest tokens kept; 0 keeps everything (transformers' own default is 50).
        repetition_penalty: As in transformers; 1 is none.

    Raises:
        ValueError: A value is out of range, or greedy decoding is combined with a sampling filter.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        # `not (... )` rather than the opposite comparison, so that nan is refused as well.
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be 0 (greedy) or a positive number, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], got {self.top_p}. Use 1.0 to keep every token.")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"`top_k` must be a whole number, 0 or above, got {self.top_k}. Use 0 to keep every token.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"`repetition_penalty` must be positive, got {self.repetition_penalty}. Use 1.0 for none.")
        if self.is_greedy and (self.top_p < 1 or self.top_k > 0):
            raise ValueError(
                f"temperature 0 is greedy decoding, which `top_p` and `top_k` cannot change, got top_p={self.top_p} "
                f"and top_k={self.top_k}. Leave them at 1.0 and 0, or sample with a temperature above 0."
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def generation_config(self, model: PreTrainedModel, max_new_tokens: int, **overrides: Any) -> GenerationConfig:
        """A complete `GenerationConfig`: only the special ids come from the model, no sampling default leaks in.

        `generate` fills what a passed config leaves unset from the model's own generation config, so every value
        that steers sampling is set here.
        """
        own = model.generation_config
        sampling: dict[str, Any] = {"do_sample": False}
        if not self.is_greedy:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            repetition_penalty=self.repetition_penalty,
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
            num_beams=1,
            **sampling,
        )
        config.update(**overrides)
        return config
