"""Who runs the target: a batched `transformers` pipeline, or continuous batching.

A backend is a function `(prompt_ids, setting, seed, on_finished) -> completions`, in the order of the prompts. It gives
the same completions for the same first three arguments; continuous batching alone is excused from that. A prompt that
it cannot get answered is a `PromptFailedError`.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextGenerationPipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

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


class AlignmentPipeline(TextGenerationPipeline):
    """Text generation from token ids to token ids.

    The stock pipeline takes text only, decodes what it returns, keeps the pads behind a finished text, and fills in
    sampling defaults of its own. This one hands over given ids and returns the exact tokens that the model wrote:

    ```python
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, pipeline_class=AlignmentPipeline)
    pipe([[1, 5, 7], [1, 9]], generation_config=setting.generation_config(target, 64), batch_size=2)
    ```

    Each prompt gives a list with one `{"completion_ids", "finish_reason"}` per returned sequence. A complete
    `generation_config` is required.
    """

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict, dict, dict]:
        config = parameters.get("generation_config")
        # The parent hands every generation parameter to `preprocess` as well, which has no use for them here.
        _, forward, _ = super()._sanitize_parameters(**parameters)
        return {}, forward, {} if config is None else {"generation_config": config}

    def preprocess(self, prompt_ids: list[int], **_: Any) -> dict[str, Any]:
        ids = torch.tensor([prompt_ids], dtype=torch.long)
        # `_forward` of the parent carries the prompt's text along; ours has none.
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_text": None}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        if "generation_config" not in generate_kwargs:
            raise ValueError(
                "AlignmentPipeline needs a complete `generation_config`; see DecodingSetting.generation_config."
            )
        return super()._forward(model_inputs, **generate_kwargs)

    def postprocess(
        self, model_outputs: dict[str, Any], generation_config: GenerationConfig | None = None, **_: Any
    ) -> list[dict[str, Any]]:
        assert generation_config is not None
        start = model_outputs["input_ids"].shape[-1]  # with left padding every completion of a batch starts here
        ends = generation_config.eos_token_id
        end_ids = frozenset() if ends is None else frozenset(ends if isinstance(ends, list) else [ends])
        records = []
        for sequence in model_outputs["generated_sequence"][0].tolist():
            completion, finish_reason = cut_completion(sequence[start:], end_ids)
            records.append({"completion_ids": completion, "finish_reason": finish_reason})
        return records


def cut_completion(generated: list[int], end_ids: frozenset[int]) -> tuple[list[int], str]:
    """Cut what follows the end token, and say why the text ended.

    What stands behind the first end token is padding, whatever its id: pad is often the end token itself, and then a
    search for pads would take the end token away.
    """
    for position, token in enumerate(generated):
        if token in end_ids:
            return generated[: position + 1], STOP
    return generated, LENGTH


def pipeline_backend(
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
        tokenizer: Its tokenizer; left as it is.
        max_new_tokens: Longest completion, in tokens.
        batch_size: Prompts a batch. Sampled completions depend on it, since a batch shares one random stream.
        suppress_tokens: Ids that must not be written, such as padded rows of the vocabulary.
    """
    tokenizer = _padding_tokenizer(tokenizer)
    # `device` would move the model; one that accelerate has spread must not be given any.
    spread = getattr(target_model, "hf_device_map", None) is not None
    pipe = AlignmentPipeline(
        model=target_model, tokenizer=tokenizer, task="text-generation", device=None if spread else target_model.device
    )
    overrides = {} if suppress_tokens is None else {"suppress_tokens": suppress_tokens}

    def answer(
        prompt_ids: list[list[int]], setting: DecodingSetting, seed: int, on_finished: Callable[[Completion], None]
    ) -> list[Completion]:
        config = setting.generation_config(
            target_model, max_new_tokens, **{"pad_token_id": tokenizer.pad_token_id, **overrides}
        )
        # Prompts of similar length share a batch, so that little is spent on padding; the sort is stable, so the
        # batches follow from the prompts alone.
        order = sorted(range(len(prompt_ids)), key=lambda number: len(prompt_ids[number]))
        rows = Dataset.from_dict({"prompt_ids": [prompt_ids[number] for number in order]})
        completions = {}
        with seeded(seed, target_model.device), evaluating(target_model):
            outputs = pipe(KeyDataset(rows, "prompt_ids"), generation_config=config, batch_size=batch_size)
            for number, records in zip(order, outputs, strict=True):
                completions[number] = Completion(records[0]["completion_ids"], records[0]["finish_reason"])
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


def _padding_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    # The pipeline turns `padding_side` to "left" and needs a pad id: on a copy, so that the caller's stays as it is.
    # Which id pads does not matter, it is masked in front of the prompt and cut off behind the completion.
    tokenizer = deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
