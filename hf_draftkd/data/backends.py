"""Who runs the target: a batched `transformers` pipeline, or continuous batching.

A backend is a function `(prompt_ids, setting, seed, on_finished) -> completions`, in the order of the prompts. It gives
the same completions for the same first three arguments; continuous batching alone is excused from that. A prompt that
it cannot have answered is a `PromptFailedError`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    ContinuousBatchingConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextGenerationPipeline,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

from hf_draftkd.decoding.setting import DecodingSetting, end_token_ids
from hf_draftkd.decoding.speculative import SpeculativeDecoding
from hf_draftkd.models.forward import evaluating, seeded
from hf_draftkd.models.tokenizers import pad_id

STOP, LENGTH = "stop", "length"
_DRAFT_LENGTH = 5  # of a draft that records none


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


class AlignmentPipeline(TextGenerationPipeline):
    """Text generation from token ids to the exact ids that the model wrote.

    The stock pipeline takes text, decodes what it returns and keeps the pads behind a finished text. Here each prompt
    gives the list of its new ids, pads behind the end token included. For batches the tokenizer must pad on the left. A
    complete `generation_config` is required, or the model's own sampling defaults would slip in.
    """

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict, dict, dict]:
        # The parent gives `preprocess` everything that `generate` is given.
        return {}, super()._sanitize_parameters(**parameters)[1], {}

    def preprocess(self, prompt_ids: list[int], **_: Any) -> dict[str, Any]:
        ids = torch.tensor([prompt_ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_text": None}

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> list[int]:
        # With left padding every completion of a batch starts at the same place.
        return model_outputs["generated_sequence"][0, 0, model_outputs["input_ids"].shape[-1] :].tolist()


def cut_completion(generated: list[int], end_ids: frozenset[int]) -> tuple[list[int], str]:
    """Cut what follows the end token, and say why the text ended.

    What stands behind the first end token is padding, whatever its id: pad is often the end token itself, and then a
    search for pads would take the end token away.
    """
    for position, token in enumerate(generated):
        if token in end_ids:
            return generated[: position + 1], STOP
    return generated, LENGTH


def helping_length(draft_model: PreTrainedModel) -> int:
    """γ of a draft that helps to write data: never the one that pays best, as rows would then depend on the clock."""
    return draft_model.generation_config.num_assistant_tokens or _DRAFT_LENGTH


def local_backend(
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    batch_size: int,
    suppress_tokens: list[int] | None = None,
    turn_end: int | None = None,
    draft_model: PreTrainedModel | None = None,
) -> Backend:
    """Answers from a local target, in batches of prompts of similar length.

    Args:
        target_model: The target, where it is to run.
        tokenizer: Its tokenizer; left as it is.
        max_new_tokens: Longest completion, in tokens.
        batch_size: Prompts per batch. Sampled completions depend on it, since a batch shares one random stream.
        suppress_tokens: Ids that must not be written, such as padded rows of the vocabulary.
        turn_end: An id that ends a text beside those of the target's generation config.
        draft_model: A draft that helps to decode. Greedy answers are the same (near-ties of low precision apart);
            sampled ones are others of the same distribution.
    """
    end_ids, overrides = _endings(target_model, turn_end, suppress_tokens)
    options: dict[str, Any] = {"batch_size": batch_size}
    if draft_model is not None:
        options["custom_generate"] = SpeculativeDecoding(draft_model, helping_length(draft_model), parallel=False)
    # On a copy, so that the caller's stays as it is. Any id pads: it is masked in front, and cut off behind.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = pad_id(target_model, tokenizer.pad_token_id, tokenizer.eos_token_id)
    # A model that accelerate has spread over devices must not be given one.
    spread = getattr(target_model, "hf_device_map", None) is not None
    pipe = pipeline(
        "text-generation",
        model=target_model,
        tokenizer=tokenizer,
        device=None if spread else target_model.device,
        pipeline_class=AlignmentPipeline,
    )
    overrides["pad_token_id"] = tokenizer.pad_token_id

    def answer(
        prompt_ids: list[list[int]], setting: DecodingSetting, seed: int, on_finished: Callable[[Completion], None]
    ) -> list[Completion]:
        config = setting.generation_config(target_model, max_new_tokens, **overrides)
        # Prompts of similar length share a batch, so that little is spent on padding; the sort is stable, so the
        # batches follow from the prompts alone.
        order = sorted(range(len(prompt_ids)), key=lambda number: len(prompt_ids[number]))
        rows = Dataset.from_dict({"prompt_ids": [prompt_ids[number] for number in order]})
        completions = {}
        with seeded(seed, target_model.device), evaluating(target_model):
            written = pipe(KeyDataset(rows, "prompt_ids"), generation_config=config, **options)
            for number, ids in zip(order, written, strict=True):
                completions[number] = Completion(*cut_completion(ids, end_ids))
                on_finished(completions[number])
        return [completions[number] for number in range(len(prompt_ids))]

    return answer


def continuous_backend(
    target_model: PreTrainedModel,
    *,
    max_new_tokens: int,
    suppress_tokens: list[int] | None = None,
    turn_end: int | None = None,
    config: ContinuousBatchingConfig | None = None,
) -> Backend:
    """Answers through transformers' continuous batching: new prompts join as others finish.

    The ids are exact. Which random numbers a prompt gets depends on the order of arrival, so a sampled run cannot be
    repeated row for row. Arguments as in `local_backend`; `config` sizes the paged cache, which by default takes most
    of the free memory.
    """
    end_ids, overrides = _endings(target_model, turn_end, suppress_tokens)

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


def _endings(
    target_model: PreTrainedModel, turn_end: int | None, suppress_tokens: list[int] | None
) -> tuple[frozenset[int], dict[str, Any]]:
    """The ids that end a text, and what the generation config has to say besides the setting."""
    end_ids = end_token_ids(target_model) | ({turn_end} if turn_end is not None else set())
    overrides: dict[str, Any] = {} if turn_end is None else {"eos_token_id": sorted(end_ids)}
    return end_ids, overrides if suppress_tokens is None else overrides | {"suppress_tokens": suppress_tokens}
