"""Speculative decoding as a callable for `generate(custom_generate=...)`: transformers prepares, this decodes.

    decoding = SpeculativeDecoding(draft)
    target.generate(**inputs, custom_generate=decoding, max_new_tokens=256)
    decoding.counts.mean_acceptance_length

A round: the draft proposes γ tokens for every text, the target reads them in one pass and keeps the first n of them,
then adds one token of its own. The host reads once a round what came out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput
from transformers.utils import logging

from hf_draftkd.acceptance import LENIENCE_FORMS, AcceptanceCounts
from hf_draftkd.decoding.auto_length import AutoLength, FixedLength
from hf_draftkd.decoding.caches import CachedModel, can_have_holes, give_room, keeps_every_token
from hf_draftkd.decoding.compiled import CompiledModels
from hf_draftkd.decoding.drafting import OneByOne, OnePass, Proposable, checked_vocabulary, with_sliced_head
from hf_draftkd.decoding.processors import Processing
from hf_draftkd.decoding.requests import check_cache, check_models, check_request, dropped_by_generate
from hf_draftkd.decoding.stopping import Stopping
from hf_draftkd.decoding.texts import Outputs, Texts
from hf_draftkd.decoding.verification import verify
from hf_draftkd.models.draft_length import recorded_parallel_length, recorded_vocabulary
from hf_draftkd.models.forward import CACHE, evaluating, unwrapped
from hf_draftkd.models.identity import checkpoint_of
from hf_draftkd.models.loading import require_loaded
from hf_draftkd.models.pairing import check_tokenizers, shared_context
from hf_draftkd.models.parallel import parallel_draft
from hf_draftkd.utils.checks import in_range, one_of, whole_number

logger = logging.get_logger(__name__)

OnRound = Callable[[int, int, int], None]
"""Drafted, accepted and new tokens of one text in one round."""
OnLogits = Callable[[int, Tensor, Tensor], None]
"""A text's number in the batch, its new tokens [K], and the target's logits [K, V] from which they were chosen."""

_LISTENERS: WeakKeyDictionary[PreTrainedModel, list[OnRound]] = WeakKeyDictionary()
# Targets whose tokenizer was compared with a draft's: of a large vocabulary that takes as long as a short text.
_KNOWN_TARGETS: WeakKeyDictionary[PreTrainedModel, WeakSet[PreTrainedModel]] = WeakKeyDictionary()


class SpeculativeDecoding:
    """Decodes with the help of a draft: `target.generate(**inputs, custom_generate=SpeculativeDecoding(draft))`.

    Greedy decoding writes the target's own text; sampling draws from the target's own distribution, whatever
    processors are set: both models' logits are processed once, by the same list, each position with its own prefix.
    Batches (left-padded, or `num_return_sequences`) work: every row accepts its own number of tokens and ends by
    itself. The result is that of `generate`: a tensor, or a dictionary with `scores` and `logits` where asked for; in
    a batch they are zero behind a row's end, and no cache is returned, since the rows' caches have holes (and with
    `compile`, since the next call writes over it). Processors are called for drafted tokens too: one that remembers
    earlier calls would go astray. A text that grows longer than the draft's context is written on without it.

    transformers 5.23 hands neither `assistant_model=` nor `streamer=` of a `generate` call on to a callable. They are
    read from the running call all the same: a streamer is used, and an `assistant_model` other than this draft is an
    error. `stop_strings=` of the call needs `tokenizer=` here, since `generate` drops its own; those of a generation
    config cannot be served (set them to None).

    Args:
        draft_model: A small causal LM with the target's vocabulary, on the target's device.
        num_assistant_tokens: γ, tokens to draft a round; "auto" chooses while decoding, by the times that it measures,
            down to plain decoding where drafting does not pay. (Give a number where a seed must repeat sampled text.)
            None: what the draft's generation config records (`num_assistant_tokens`; in one pass
            `parallel_num_assistant_tokens`), otherwise "auto". (Its `assistant_confidence_threshold` and schedule are
            of transformers' loop and do not matter.)
        parallel: Draft all γ tokens in one pass, which needs a draft trained with `parallel_tokens` of γ or more. None:
            if the draft's config says that it is such a draft. False: one by one, as with an ordinary draft.
        draft_vocabulary: Ids that the draft may propose: its head is sliced to them. None: the `draft_vocabulary` of
            its generation config, otherwise all. The target's distribution is never restricted.
        lenience: Below 1 decoding is lossy: ε in (0, 1], or the weight w of form "ensemble".
        lenience_form: "linear", "square", "exponential" (arXiv 2310.08461) or "ensemble" (transformers'
            `assistant_ensemble_weight`, which is honoured too). Greedy decoding knows "ensemble" only.
        streamer: Receives the prompt and the tokens of a single text, a round at a time.
        tokenizer: The target's; only `stop_strings` need it.
        on_logits: Called every round for each text with its new tokens and the target's logits of them, before any
            processor; copy or reduce them at once: the memory is reused in the next round.
        compile: Compile both models with static caches and fixed shapes, by `compile_config` of the call where it is
            given. The first call with a new batch size, or with longer texts than before, compiles for some
            minutes. On CPUs eager is faster for small models; on accelerators it was not measured. Calls share their
            caches: make one object for each thread.

    Attributes:
        compiled: With `compile`: what is kept from call to call, and `compiled.compile_seconds`.
        counts: What all calls so far drafted and accepted, one count a text and round.
        draft_vocabulary: Ids that the draft may propose, ascending; None for all.
        prompt_padding: How many columns of each prompt of the last call were padding.

    Raises:
        ValueError: An argument is out of range. A call of `generate` that cannot be honoured raises before decoding:
            another tokenizer or vocabulary, an encoder-decoder or recurrent model, beams, right padding and so on.
    """

    def __init__(
        self,
        draft_model: PreTrainedModel,
        num_assistant_tokens: int | str | None = None,
        *,
        parallel: bool | None = None,
        draft_vocabulary: list[int] | None = None,
        lenience: float = 1.0,
        lenience_form: str = "exponential",
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        on_logits: OnLogits | None = None,
        compile: bool = False,
    ) -> None:
        require_loaded(draft_model)
        self.draft_model = unwrapped(draft_model)
        self._context = shared_context(self.draft_model)
        config = self.draft_model.generation_config
        found = None if parallel is False else parallel_draft(self.draft_model.config)
        if parallel and found is None:
            raise ValueError(
                f"`parallel=True` needs a draft that was trained with `parallel_tokens`, but the config of "
                f"{self.draft_model.name_or_path or 'this draft'} names no mask token (`pard_token`). Leave it out."
            )
        self.mask_token_id = None if found is None else found.mask_token_id
        longest = None if found is None else found.num_tokens
        if num_assistant_tokens is None:
            recorded = config.num_assistant_tokens if found is None else recorded_parallel_length(config)
            num_assistant_tokens = recorded or "auto"
        self.length: AutoLength | FixedLength
        if num_assistant_tokens == "auto":
            if compile:
                raise ValueError('`compile=True` has one shape: give `num_assistant_tokens` as a number, not "auto".')
            self.length = AutoLength(longest or 16)
        else:
            length = whole_number("num_assistant_tokens", num_assistant_tokens)
            if longest is not None and length > longest:
                raise ValueError(
                    f"`num_assistant_tokens={length}`, but the draft was trained to predict {longest} tokens in one "
                    f"pass. Give {longest} or less, or draft one by one with `parallel=False`."
                )
            self.length = FixedLength(length)
        self.lenience = in_range("lenience", lenience, 0, 1, open_low=True)
        self.lenience_form = one_of("form of lenience", lenience_form, LENIENCE_FORMS)
        self.streamer, self.tokenizer, self.on_logits = streamer, tokenizer, on_logits
        self.compiled = CompiledModels() if compile else None
        self._suppressed = list(config.suppress_tokens or ())
        if draft_vocabulary is None:
            draft_vocabulary = recorded_vocabulary(config)
        if draft_vocabulary is not None:
            vocab_size = self.draft_model.config.get_text_config().vocab_size
            draft_vocabulary = sorted(checked_vocabulary(draft_vocabulary, vocab_size, self._suppressed))
        self.draft_vocabulary = draft_vocabulary
        self._place_proposals()
        self.counts = AcceptanceCounts()
        self.prompt_padding: list[int] = []

    def _place_proposals(self) -> None:
        """What draws from the draft, as the draft is now."""
        self._placed = self.draft_model.device, self.draft_model.dtype
        self._proposing_model = self.draft_model
        if self.draft_vocabulary is not None:
            self._proposing_model = with_sliced_head(self.draft_model, self.draft_vocabulary)
        self._proposable = Proposable(self.draft_model, self.draft_vocabulary, self._suppressed)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        stop_strings: str | list[str] | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """What `generate` calls, with everything prepared; returns what `generate` returns."""
        dropped = dropped_by_generate()
        self._check_pair(model, dropped.get("assistant_model"))
        if (self.draft_model.device, self.draft_model.dtype) != self._placed:  # moved or cast since
            self._place_proposals()
        is_synced = bool(dropped.get("synced_gpus"))
        check_request(model, input_ids, logits_processor, generation_config, model_kwargs, is_synced)
        read = check_cache(model_kwargs.get(CACHE), generation_config, input_ids, model_kwargs.get("attention_mask"))
        lenience, form = self._lenience(generation_config)
        if stop_strings is not None:
            stopping_criteria.append(self._stop_strings(stop_strings))
        streamer = self._streamer(dropped.get("streamer"), input_ids)
        stopping = Stopping(stopping_criteria, input_ids.shape[1])
        texts = Texts(input_ids, model_kwargs.get("attention_mask"), stopping.max_length, spare=self.length.longest + 1)
        self.prompt_padding = texts.padding
        is_greedy = not generation_config.do_sample
        processing = Processing(logits_processor, texts, stopping.eos_ids, is_greedy=is_greedy)
        target, draft = self._models(model, model_kwargs[CACHE], texts, read, generation_config)
        needs = {"samples": not is_greedy, "needs_q": not is_greedy or lenience < 1}
        propose = OneByOne(draft, self._proposable, processing, **needs)
        if self.mask_token_id is not None:
            propose = OnePass(draft, self._proposable, processing, self.mask_token_id, **needs)

        outputs = Outputs(generation_config, len(input_ids))
        listeners = [self.counts.record, *_LISTENERS.get(model, ())]
        # What they share is put back as the draft itself was.
        with evaluating(self._proposing_model, model, self.draft_model):
            _prefill(target, texts, generation_config)
            started: float | None = None
            while not all(texts.done):
                num_texts = len(texts.rows)
                num_drafted = self._num_drafted(texts)
                proposal = propose(texts, num_drafted)
                logits = target(texts.piece(target.read, num_drafted), num_logits=num_drafted + 1)
                target.read = [texts.lengths[row] + num_drafted for row in texts.rows]
                scores = processing(logits)
                verdict = verify(*proposal, scores, is_greedy=is_greedy, lenience=lenience, form=form)
                texts.write(verdict[:, :-1], offset=0)

                accepted = []
                out_of_time = stopping.is_out_of_time(texts.ids)
                for place, (*tokens, n) in enumerate(verdict.tolist()):  # the one transfer to the host
                    row = texts.rows[place]
                    if texts.done[row]:
                        continue
                    kept, is_done = stopping.kept(texts, row, tokens[: n + 1])
                    outputs.add(row, scores[place, :kept], logits[place, :kept])
                    if self.on_logits is not None:
                        self.on_logits(row, verdict[place, :kept], logits[place, :kept])
                    for listen in listeners:
                        listen(num_drafted, min(n, kept), kept)
                    texts.lengths[row] += kept
                    if streamer is not None:
                        streamer.put(torch.tensor([tokens[:kept]]))
                    texts.done[row] = is_done or out_of_time
                    if not texts.done[row]:
                        accepted.append(n)
                now = perf_counter()
                self.length.record(num_texts, num_drafted, accepted, None if started is None else now - started)
                started = now
                _next_round(texts, (target, draft), num_drafted)

        if streamer is not None:
            streamer.end()
        # Behind a finished text stands what `generate` puts there, whether or not the model has a row for it.
        pad = generation_config._pad_token_tensor
        sequences = texts.finished(0 if pad is None else int(pad))
        # Holes are in a batch's cache, and a compiled one is written over by the next call.
        return outputs.result(sequences, target.cache if texts.is_single and self.compiled is None else None)

    def _num_drafted(self, texts: Texts) -> int:
        """Tokens to draft in the next round: within the draft's own context, and no more than can still be written."""
        wanted = self.length.choose(len(texts.rows))
        longest = max(texts.lengths[row] - texts.padding[row] for row in texts.rows)
        room = max(0, self._context - longest + 1)  # the last drafted token it does not read
        if self.compiled is not None:
            # One shape or nothing; positions end with the longest text asked for.
            return wanted if wanted <= room or texts.max_length <= self._context else self._past_context()
        return min(wanted, texts.most_remaining() - 1, room or self._past_context())

    def _past_context(self) -> int:
        """Nothing to draft, and a word about it."""
        logger.warning_once("A text is longer than the draft can read: from there on nothing is drafted.")
        return 0

    def _check_pair(self, target: PreTrainedModel, assistant: PreTrainedModel | None) -> None:
        if assistant is not None and unwrapped(assistant) is not self.draft_model:
            raise ValueError(
                "`assistant_model` was given to `generate` beside `custom_generate=SpeculativeDecoding(...)`, which "
                "has another draft. Give one of them: `SpeculativeDecoding(assistant_model)` or `assistant_model=`."
            )
        check_models(self.draft_model, target)
        known = _KNOWN_TARGETS.setdefault(self.draft_model, WeakSet())
        if target in known:
            return
        pair = self.draft_model, target
        names = [model.name_or_path for model in pair]
        if all(name and (Path(name) / "tokenizer_config.json").is_file() for name in names):
            check_tokenizers(*(checkpoint_of(model).tokenizer for model in pair))
        known.add(target)

    def _lenience(self, config: GenerationConfig) -> tuple[float, str]:
        lenience, form = self.lenience, self.lenience_form
        if config.assistant_ensemble_weight is not None:
            if lenience < 1:
                raise ValueError("Both `lenience` and `assistant_ensemble_weight` are set: give one of them.")
            lenience, form = config.assistant_ensemble_weight, "ensemble"
        if lenience < 1 and form != "ensemble" and not config.do_sample:
            raise ValueError(
                f'`lenience_form="{form}"` compares probabilities, which greedy decoding does not: sample '
                '(`do_sample=True`), or use `lenience_form="ensemble"`.'
            )
        return lenience, form

    def _streamer(self, given: BaseStreamer | None, input_ids: Tensor) -> BaseStreamer | None:
        """The streamer of this call, `given` to `generate`, or of all calls; it has the prompt."""
        streamer = given or self.streamer
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"A streamer follows one text, but the batch has {len(input_ids)}. Leave it out.")
        if streamer is not None and given is None:  # `generate` put the prompt into its own already
            streamer.put(input_ids.cpu())
        return streamer

    def _stop_strings(self, stop_strings: str | list[str]) -> StopStringCriteria:
        if self.tokenizer is None:
            raise ValueError(
                "`stop_strings` needs the target's tokenizer, which `generate` does not pass on: give it to "
                "`SpeculativeDecoding(draft, tokenizer=tokenizer)`."
            )
        return StopStringCriteria(tokenizer=self.tokenizer, stop_strings=stop_strings)

    def _models(
        self,
        target: PreTrainedModel,
        cache: DynamicCache | StaticCache,
        texts: Texts,
        read: int,
        config: GenerationConfig,
    ) -> tuple[CachedModel, CachedModel]:
        """Target and draft with their caches."""
        draft_cache = DynamicCache(config=self.draft_model.config.get_text_config(decoder=True))
        if not texts.is_single and isinstance(cache, DynamicCache):
            # The caller's own would be left with holes, and without the rows that ended first.
            cache = DynamicCache(config=target.config.get_text_config(decoder=True), offloading=cache.offloading)
        if self.compiled is None and not texts.is_single and isinstance(cache, StaticCache):
            raise ValueError(
                "A batch needs room for rejected tokens that a static cache of this length does not have. Use the "
                "dynamic cache (leave out `cache_implementation`), or one prompt at a time."
            )
        if any(draft_cache.is_linear):
            raise ValueError("The draft has linear attention, which cannot be rolled back. Decode without a draft.")
        for name, each, reader in (("target", cache, target), ("draft", draft_cache, self.draft_model)):
            config_of_text = reader.config.get_text_config(decoder=True)
            if (self.compiled is not None or not texts.is_single) and not can_have_holes(each, config_of_text):
                raise ValueError(
                    f"The {name} has a sliding window, or attention that counts columns (MPT, GPT-Neo): texts of a "
                    "batch cannot advance by different numbers of tokens in it. Decode one prompt at a time, without "
                    "`compile`."
                )
        if isinstance(cache, StaticCache) and not keeps_every_token(cache):
            raise ValueError(
                "The target has a sliding window, which a static cache overwrites and cannot roll back. Leave out "
                "`cache_implementation`."
            )
        if self.compiled is not None:
            if read:
                raise ValueError(f"`compile=True` starts with an empty cache, but the given one holds {read} tokens.")
            # A round of the draft begins with its last two tokens, whether it has read the first of them or not; in
            # parallel it has read none of the γ + 1 that the last round may have brought.
            longest = self.length.longest
            shape: tuple[tuple[int, ...], int] = ((1, 2), 2)
            if self.mask_token_id is not None:
                shape = ((2 * longest,), longest + 1)
            return (
                self.compiled.cached(target, texts, (longest + 1, 1), 1, config),
                self.compiled.cached(self._proposing_model, texts, *shape, config),
            )
        if isinstance(cache, DynamicCache):
            give_room(cache)
        return (
            CachedModel(target, cache, texts, read),
            CachedModel(self._proposing_model, give_room(draft_cache), texts),
        )


@contextmanager
def listening(target: PreTrainedModel, on_round: OnRound) -> Iterator[None]:
    """Call `on_round(drafted, accepted, new)` for every text and round that a SpeculativeDecoding does on `target`."""
    listeners = _LISTENERS.setdefault(target, [])
    listeners.append(on_round)
    try:
        yield
    finally:
        listeners.remove(on_round)


def _prefill(target: CachedModel, texts: Texts, config: GenerationConfig) -> None:
    """Read a long prompt in chunks, where that is asked for; its last token is read with the first drafted ones."""
    if config.prefill_chunk_size is None:
        return
    while target.read[0] < texts.prompt_length - 1:
        piece = texts.piece(target.read)
        width = min(config.prefill_chunk_size, piece.ids.shape[1] - 1)
        target(piece.part(slice(0, width)), num_logits=1)
        target.read = [seen + width for seen in target.read]


def _next_round(texts: Texts, models: tuple[CachedModel, ...], num_drafted: int) -> None:
    """Roll the caches back to the texts' last tokens, and let finished texts go."""
    for model in models:
        model.keep([max(0, texts.lengths[row] - model.num_unread) for row in texts.rows])
    places = [place for place, row in enumerate(texts.rows) if not texts.done[row]]
    if texts.is_single or not places:
        return
    if len(places) < len(texts.rows) and all(model.drops_rows for model in models):
        texts.rows = [texts.rows[place] for place in places]
        for model in models:
            model.keep_rows(places)
    else:
        for model in models:
            model.squeeze_if_worthwhile(num_drafted + 1)
