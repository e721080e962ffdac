"""Static caches and compiled steps: shapes that never change, for accelerators that replay a recorded graph.

The draft begins every round with a text's last two tokens, whether it has read the first of them or not, and goes on
one by one; a parallel draft begins with the last γ + 1, and reads γ − 1 mask tokens with them. The target always reads
γ + 1, and where the draft's context has ended one. Prompts are read without compilation.
"""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel, StaticCache

from hf_draftkd.decoding.caches import CachedModel
from hf_draftkd.decoding.texts import Piece, Texts
from hf_draftkd.models.forward import CACHE


class CompiledModels:
    """Compiled forwards and static caches, kept from call to call so that nothing is compiled twice.

    One cache is kept for each model and batch size, the longest so far: shorter texts are read in it, a longer one
    takes its place.

    Attributes:
        compile_seconds: Wall-clock of all first steps with a new shape, which is when compilation happens.
    """

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self._forwards: dict[tuple[int, str], Any] = {}
        self._caches: dict[tuple[int, int], StaticCache] = {}
        self._seen: set[tuple[int, torch.Size, torch.Size]] = set()

    def cached(
        self, model: PreTrainedModel, texts: Texts, widths: tuple[int, ...], num_unread: int, config: GenerationConfig
    ) -> "StaticModel":
        """A model with an empty static cache, whose pieces of one of `widths` are read by its compiled forward.

        Each round begins with the last `num_unread` columns of every text.

        Raises:
            ValueError: The model's attention takes no boolean mask.
        """
        if model.config._attn_implementation != "sdpa":
            raise ValueError(
                f"`compile=True` needs sdpa attention, got {model.config._attn_implementation!r}. Load the model with "
                '`attn_implementation="sdpa"`, or leave `compile` out.'
            )
        # Room for rejected tokens that lie between two squeezes; rounded, so that calls of like length share a cache.
        capacity = (texts.ids.shape[1] + 2 * max(widths) + 127) // 64 * 64
        key = (id(model), len(texts.lengths))
        cache = self._caches.get(key)
        # What was made under `torch.inference_mode()` can only be written to there.
        if (
            cache is None
            or cache.layers[0].max_cache_len < capacity
            or (cache.layers[0].cumulative_length.is_inference() and not torch.is_inference_mode_enabled())
        ):
            text_config = model.config.get_text_config(decoder=True)
            cache = self._caches[key] = StaticCache(config=text_config, max_cache_len=capacity)
        cache.reset()
        options = config.compile_config or CompileConfig(
            dynamic=False, mode="reduce-overhead" if model.device.type == "cuda" else "default"
        )
        name = str(sorted(options.to_dict().items(), key=str))
        if (id(model), name) not in self._forwards:
            self._forwards[id(model), name] = torch.compile(model.forward, **options.to_dict())
        return StaticModel(model, cache, texts, self._forwards[id(model), name], widths, num_unread, self)

    def timed(self, forward: Any, inputs: dict[str, Any], model: PreTrainedModel) -> Tensor:
        """Logits of a compiled step, in memory of their own: a replayed graph writes over its last output."""
        if model.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        shape = (id(model), inputs["input_ids"].shape, inputs["attention_mask"].shape)
        if shape in self._seen:
            return forward(**inputs).logits.clone()
        self._seen.add(shape)
        started = perf_counter()
        # The code of a forward is that of all models of its class: every shape of each counts as a recompilation.
        with torch._dynamo.config.patch(recompile_limit=64):
            logits = forward(**inputs).logits.clone()
        self.compile_seconds += perf_counter() - started
        return logits


class StaticModel(CachedModel):
    """A `CachedModel` whose cache never grows: masks have all columns, and finished rows stay."""

    drops_rows = False

    def __init__(
        self,
        model: PreTrainedModel,
        cache: StaticCache,
        texts: Texts,
        compiled: Any,
        widths: tuple[int, ...],
        num_unread: int,
        owner: CompiledModels,
    ) -> None:
        super().__init__(model, cache, texts)
        self._compiled, self._widths, self._owner = compiled, widths, owner
        self.num_unread = num_unread
        self._capacity = cache.layers[0].max_cache_len
        self._mask = torch.zeros(len(self.read), self._capacity, dtype=torch.bool, device=texts.ids.device)
        self._places = torch.arange(self._capacity, device=texts.ids.device)

    def __call__(self, piece: Piece, num_logits: int) -> Tensor:
        """Read a piece; return the logits [B, num_logits, V] of its last tokens."""
        width = piece.ids.shape[1]
        end = self._columns + width
        self._mask[:, self._columns : end] = True if piece.is_token is None else piece.is_token
        causal = self._places <= self._places[self._columns : end, None]
        # A token that is none sees itself: attention over nothing is not defined.
        itself = self._places == self._places[self._columns : end, None]
        # `contiguous` leaves a single row the strides of its buffer, and with them each length would be compiled anew.
        ids, positions = (each.clone(memory_format=torch.contiguous_format) for each in piece[:2])
        inputs = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": ((self._mask[:, None] & causal) | itself)[:, None],
            CACHE: self.cache,
            "use_cache": True,
            "logits_to_keep": num_logits,
        }
        self._columns = end
        if width in self._widths:
            return self._owner.timed(self._compiled, inputs, self.model)
        return self.model(**inputs).logits

    def keep(self, lengths: list[int]) -> None:
        """Forget what was read behind `lengths` columns of each text, and mask what the cache still holds there."""
        super().keep(lengths)
        self._mask[:, self._columns :] = False

    def squeeze_if_worthwhile(self, num_new: int) -> None:
        """As in a cache that grows, and whenever a round might not find room."""
        if self._columns + num_new + max(self._widths) > self._capacity:
            self.keep_rows(list(range(len(self.read))))
        else:
            super().squeeze_if_worthwhile(num_new)

    def keep_rows(self, places: list[int]) -> None:
        """Close the holes; all rows stay."""
        super().keep_rows(places)
        self._mask = torch.nn.functional.pad(self._mask[:, : self._columns], (0, self._capacity - self._columns))
