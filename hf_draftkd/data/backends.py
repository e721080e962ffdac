"""Who runs the target: a batched `transformers` pipeline, or continuous batching.

A backend is a function `(prompt_ids, setting, seed, finished)` that yields groups of completions, by the numbers of
their prompts, as soon as they are there. They are the same for the same first three arguments; continuous batching
alone is excused from that. What an earlier call for the same had `finished` is not written again. A prompt that it
cannot have answered is a `PromptFailedError`.
"""

import copy
from collections.abc import Callable, Generator, Iterator, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextGenerationPipeline,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

from hf_draftkd.data.kept_distributions import CacheOptions, KeptDistributions
from hf_draftkd.data.target_cache import cache_columns, num_rows
from hf_draftkd.decoding.setting import DecodingSetting, end_token_ids
from hf_draftkd.decoding.speculative import SpeculativeDecoding
from hf_draftkd.models.forward import evaluating, seeded, unwrapped
from hf_draftkd.models.tokenizers import pad_id
from hf_draftkd.utils.hashing import derived_seed

STOP, LENGTH = "stop", "length"
_DRAFT_LENGTH = 5  # of a draft that records none


@dataclass(frozen=True)
class Completion:
    """What the target wrote for one prompt.

    Attributes:
        token_ids: The exact tokens, with the end token if the target wrote one.
        finish_reason: `stop` where the target ended its text, `length` where `max_new_tokens` ended it; `REFUSED` where
            there is none, and no row is to be made.
        text: The text as an endpoint returned it; None where the ids are the source.
        ids_source: `generated` where these are exactly the tokens the target wrote; `retokenized` where an endpoint
            returned text only, or hid the end token.
        distributions: The row's cache columns, where they were asked for; a server may have withheld them.
    """

    token_ids: list[int]
    finish_reason: str
    text: str | None = None
    ids_source: str = "generated"
    distributions: dict[str, Any] | None = None


REFUSED = "refused"


class PromptFailedError(Exception):
    """The target cannot answer one prompt, and asking again would not help; the message says why.

    Attributes:
        number: Which of the prompts that the backend was given.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


Groups = Generator[dict[int, Completion], None, None]
Backend = Callable[[list[list[int]], DecodingSetting, int, Set[int]], Groups]


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


class StepRecorder(StoppingCriteria):
    """Hands the target's logits and the token chosen from them to `kept` at each step of `generate`, and stops nothing.

    `generate` returns logits only after the last step, all of them, in float32. A forward hook sees those of one step,
    before any processor, and a stopping criterion is what `generate` calls once their token is known.
    """

    kept: KeptDistributions

    @contextmanager
    def watching(self, target_model: PreTrainedModel) -> Iterator[None]:
        """Look at every forward pass of the target."""

        def see(_module: Any, _inputs: Any, output: Any) -> None:
            self._logits = output.logits[:, -1].clone()  # a view would keep those of a whole prompt

        hook = unwrapped(target_model).register_forward_hook(see)
        try:
            yield
        finally:
            hook.remove()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.kept.add_step(input_ids[:, -1], self._logits.to(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


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
    cache: tuple[CacheOptions, int] | None = None,
) -> Backend:
    """Answers from a local target, in batches of prompts of similar length.

    Args:
        target_model: The target, where it is to run.
        tokenizer: Its tokenizer; left as it is.
        max_new_tokens: Longest completion, in tokens.
        batch_size: Prompts per batch. Sampled completions depend on it, since a batch shares one random stream; each
            batch has its own, so that it can be written without those before it.
        suppress_tokens: Ids that must not be written, such as padded rows of the vocabulary.
        turn_end: An id that ends a text beside those of the target's generation config.
        draft_model: A draft that helps to decode. Greedy answers are the same (near-ties of low precision apart);
            sampled ones are others of the same distribution.
        cache: What to keep of the distributions that the tokens were chosen from, before any processor, and V.
    """
    end_ids, overrides = _endings(target_model, turn_end, suppress_tokens)
    options: dict[str, Any] = {"batch_size": batch_size}
    recorder = decoding = None
    if draft_model is not None:
        decoding = SpeculativeDecoding(draft_model, helping_length(draft_model), parallel=False)
        options["custom_generate"] = decoding
    elif cache is not None:
        recorder = StepRecorder()
        options["stopping_criteria"] = StoppingCriteriaList([recorder])
    # A copy, so that the caller's stays as it is. Any id will do as padding: it is masked in front, and cut off behind.
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

    def answer(prompt_ids: list[list[int]], setting: DecodingSetting, seed: int, finished: Set[int]) -> Groups:
        config = setting.generation_config(target_model, max_new_tokens, **overrides)
        # Prompts of similar length share a batch, so that little is spent on padding; the sort is stable, so the
        # batches follow from the prompts alone.
        order = sorted(range(len(prompt_ids)), key=lambda number: len(prompt_ids[number]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        left = {at: batch for at, batch in enumerate(batches) if not finished >= set(batch)}
        rows = Dataset.from_dict({"prompt_ids": [prompt_ids[number] for batch in left.values() for number in batch]})
        watching = nullcontext() if recorder is None else recorder.watching(target_model)
        with seeded(seed, target_model.device), evaluating(target_model), watching:
            # The pipeline answers a batch when its first answer is asked for.
            written = iter(pipe(KeyDataset(rows, "prompt_ids"), generation_config=config, **options) if left else ())
            for at, batch in left.items():
                torch.manual_seed(derived_seed(seed, at))
                if cache is not None:
                    kept = KeptDistributions(*cache, [prompt_ids[number] for number in batch])
                    if recorder is not None:
                        recorder.kept = kept
                    elif decoding is not None:
                        decoding.on_logits = kept.add
                answers = {}
                for place, number in enumerate(batch):
                    ids, reason = cut_completion(next(written), end_ids)
                    distributions = None if cache is None else kept.columns(place, len(ids), num_rows(target_model))
                    answers[number] = Completion(ids, reason, distributions=distributions)
                yield answers

    return answer


def continuous_backend(
    target_model: PreTrainedModel,
    *,
    max_new_tokens: int,
    suppress_tokens: list[int] | None = None,
    batch_size: int = 8,
    turn_end: int | None = None,
    config: ContinuousBatchingConfig | None = None,
    cache: tuple[CacheOptions, int] | None = None,
) -> Backend:
    """Answers through transformers' continuous batching: new prompts join as others finish.

    The ids are exact. Which random numbers a prompt gets depends on the order of arrival, so a sampled run cannot be
    repeated row for row. Arguments as in `local_backend`; `config` sizes the paged cache, which by default takes most
    of the free memory. It shows no logits: for a cache the target reads the answers again, `batch_size` at a time.
    """
    end_ids, overrides = _endings(target_model, turn_end, suppress_tokens)

    def answer(prompt_ids: list[list[int]], setting: DecodingSetting, seed: int, finished: Set[int]) -> Groups:
        left = [number for number in range(len(prompt_ids)) if number not in finished]
        with seeded(seed, target_model.device), evaluating(target_model):
            outputs = target_model.generate_batch(
                inputs=[prompt_ids[number] for number in left],
                generation_config=setting.generation_config(target_model, max_new_tokens, **overrides),
                continuous_batching_config=config,
            )
        # In the order of the prompts; a request that failed is missing or carries its error, and only a log says so.
        failed = [output.error for output in outputs.values() if output.error]
        if failed or len(outputs) < len(left):
            reason = failed[0] if failed else f"{len(left) - len(outputs)} prompts got no answer"
            raise RuntimeError(f"Continuous batching failed: {reason}. Leave it off, or give it a smaller cache.")
        written = [cut_completion(list(output.generated_tokens), end_ids) for output in outputs.values()]
        for start in range(0, len(left), batch_size):
            batch, texts = left[start : start + batch_size], written[start : start + batch_size]
            distributions: list[Any] = [None] * len(batch)
            if cache is not None:
                prompts = [prompt_ids[number] for number in batch]
                distributions = cache_columns(target_model, *cache, prompts, [ids for ids, _ in texts])
            yield {
                number: Completion(ids, reason, distributions=columns)
                for number, (ids, reason), columns in zip(batch, texts, distributions, strict=True)
            }

    return answer


def _endings(
    target_model: PreTrainedModel, turn_end: int | None, suppress_tokens: list[int] | None
) -> tuple[frozenset[int], dict[str, Any]]:
    """The ids that end a text, and what the generation config has to say besides the setting."""
    end_ids = end_token_ids(target_model) | ({turn_end} if turn_end is not None else set())
    overrides: dict[str, Any] = {} if turn_end is None else {"eos_token_id": sorted(end_ids)}
    return end_ids, overrides | {"suppress_tokens": suppress_tokens}
