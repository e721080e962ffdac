"""Who runs the target: `generate` in batches, or continuous batching.

A backend is a function `(prompt_ids, setting, seed, on_finished) -> completions`, in the order of the prompts. It gives
the same completions for the same first three arguments; continuous batching alone is excused from that. A prompt that
it cannot have answered is a `PromptFailedError`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.decoding.setting import DecodingSetting, end_token_ids
from hf_draftkd.models.forward import evaluating, seeded

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Completion:
    """What the target wrote for one prompt.

    Attributes:
        token_ids: The exact tokens, with the end token if the target wrote one.
        finish_reason: `stop` where the target ended its text, `length` where `max_new_tokens` ended it.
        text: The text as an endpoint returned it; None where the ids are the source.
        ids_source: `generated` where these are exactly the tokens the target wrote; `retokenized` where an endpoint
            returned text only, or hid the end token.
        distributions: The row's cache columns, where an endpoint returned log-probabilities.
    """

    token_ids: list[int]
    finish_reason: str
    text: str | None = None
    ids_source: str = "generated"
    distributions: dict[str, Any] | None = None


class PromptFailedError(Exception):
    """The target cannot answer one prompt, and asking again would not help; the message says why.

    Attributes:
        number: Which of the prompts that the backend was given.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


Backend = Callable[[list[list[int]], DecodingSetting, int, Callable[[Completion], None]], list[Completion]]


def cut_completion(generated: list[int], end_ids: frozenset[int]) -> tuple[list[int], str]:
    """Cut what follows the end token, and say why the text ended.

    What stands behind the first end token is padding, whatever its id: pad is often the end token itself, and then a
    search for pads would take the end token away.
    """
    for position, token in enumerate(generated):
        if token in end_ids:
            return generated[: position + 1], STOP
    return generated, LENGTH


def local_backend(
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    batch_size: int,
    suppress_tokens: list[int] | None = None,
) -> Backend:
    """Answers from a local target, in batches of prompts of similar length.

    Args:
        target_model: The target, where it is to run.
        tokenizer: Its tokenizer, which names a token to pad with.
        max_new_tokens: Longest completion, in tokens.
        batch_size: Prompts per batch. Sampled completions depend on it, since a batch shares one random stream.
        suppress_tokens: Ids that must not be written, such as padded rows of the vocabulary.
    """
    end_ids = end_token_ids(target_model)
    # Any id will do: it is masked in front of the prompt and cut off behind the completion.
    pad = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
    overrides: dict[str, Any] = {"pad_token_id": pad}
    if suppress_tokens is not None:
        overrides["suppress_tokens"] = suppress_tokens

    def answer(
        prompt_ids: list[list[int]], setting: DecodingSetting, seed: int, on_finished: Callable[[Completion], None]
    ) -> list[Completion]:
        config = setting.generation_config(target_model, max_new_tokens, **overrides)
        # Prompts of similar length share a batch, so that little is spent on padding; the sort is stable, so the
        # batches follow from the prompts alone.
        order = sorted(range(len(prompt_ids)), key=lambda number: len(prompt_ids[number]))
        completions = {}
        with seeded(seed, target_model.device), evaluating(target_model):
            for numbers in DataLoader(order, batch_size, collate_fn=list):  # type: ignore[arg-type]
                ids = [torch.tensor(prompt_ids[number]) for number in numbers]
                inputs = {
                    "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left"),
                    "attention_mask": pad_sequence(
                        [torch.ones_like(each) for each in ids], batch_first=True, padding_side="left"
                    ),
                }
                inputs = {name: value.to(target_model.device) for name, value in inputs.items()}
                written = target_model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
                for number, sequence in zip(numbers, written.tolist(), strict=True):
                    completions[number] = Completion(*cut_completion(sequence, end_ids))
                    on_finished(completions[number])
        return [completions[number] for number in range(len(prompt_ids))]

    return answer


def continuous_backend(
    target_model: PreTrainedModel,
    *,
    max_new_tokens: int,
    suppress_tokens: list[int] | None = None,
    config: ContinuousBatchingConfig | None = None,
) -> Backend:
    """Answers through transformers' continuous batching: new prompts join as others finish.

    The ids are exact. Which random numbers a prompt gets depends on the order of arrival, so a sampled run cannot be
    repeated row for row.

    Args:
        target_model: The target, where it is to run.
        max_new_tokens: Longest completion, in tokens.
        suppress_tokens: Ids that must not be written.
        config: Size of the paged cache and the like. By default transformers takes most of the free memory.
    """
    end_ids = end_token_ids(target_model)
    overrides = {} if suppress_tokens is None else {"suppress_tokens": suppress_tokens}

    def answer(
        prompt_ids: list[list[int]], setting: DecodingSetting, seed: int, on_finished: Callable[[Completion], None]
    ) -> list[Completion]:
        with seeded(seed, target_model.device), evaluating(target_model):
            outputs = target_model.generate_batch(
                inputs=prompt_ids,
                generation_config=setting.generation_config(target_model, max_new_tokens, **overrides),
                continuous_batching_config=config,
            )
        # In the order of the prompts; a request that failed is missing or carries its error, and only a log says so.
        failed = [output.error for output in outputs.values() if output.error]
        if failed or len(outputs) < len(prompt_ids):
            reason = failed[0] if failed else f"{len(prompt_ids) - len(outputs)} prompts got no answer"
            raise RuntimeError(f"Continuous batching failed: {reason}. Leave it off, or give it a smaller cache.")
        completions = []
        for output in outputs.values():
            completions.append(Completion(*cut_completion(list(output.generated_tokens), end_ids)))
            on_finished(completions[-1])
        return completions

    return answer
