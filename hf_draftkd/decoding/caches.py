"""A model with what it has read: its cache, rolled back after rejections, and the holes that a batch leaves in it.

Rows of a batch accept different numbers of tokens. Rejected tokens that some rows keep and others do not stay in the
cache as holes: their mask is zero and positions are given explicitly, so no row sees them. Holes are squeezed out when
reading over them costs more than moving the rest.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import DummyLayer, DynamicLayer, StaticLayer

from hf_draftkd.decoding.texts import Piece, Texts
from hf_draftkd.models.forward import CACHE

# Layers in which a hole can be masked: every token is kept, and sees others by the mask alone.
_MASKABLE = (DynamicLayer, StaticLayer, DummyLayer)
# Models that count columns, whatever mask and positions say: MPT for its bias, GPT-Neo for its local window.
_BY_COLUMN = ("mpt", "gpt_neo")


class GrowingLayer(DynamicLayer):
    """A dynamic layer with room behind its tokens: a step writes one token instead of copying all before it."""

    keys: Tensor
    values: Tensor
    _key_room: Tensor
    _value_room: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, K, D]; return all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        # Whoever selects or reorders rows puts tensors of their own in the place of the views; and room that was made
        # under `torch.inference_mode()` can only be written to there.
        if (
            start == 0
            or self.keys.data_ptr() != self._key_room.data_ptr()
            or end > self._key_room.shape[-2]
            or (self._key_room.is_inference() and not torch.is_inference_mode_enabled())
        ):
            spare = max(64, end // 4)
            self._key_room = _with_room(self.keys, key_states, start, end + spare)
            self._value_room = _with_room(self.values, value_states, start, end + spare)
        self._key_room[..., start:end, :] = key_states
        self._value_room[..., start:end, :] = value_states
        self.keys, self.values = self._key_room[..., :end, :], self._value_room[..., :end, :]
        return self.keys, self.values


def _with_room(old: Tensor, new: Tensor, used: int, capacity: int) -> Tensor:
    room = new.new_empty((*new.shape[:-2], capacity, new.shape[-1]))
    if used:
        room[..., :used, :] = old
    return room


def give_room(cache: Cache) -> Cache:
    """Let the plain dynamic layers of an empty cache grow in place; other layers stay what they are."""
    if cache.get_seq_length() == 0:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache.activate_past_recording()
    return cache


def keeps_every_token(cache: Cache) -> bool:
    """Whether each layer holds all that was read: windows and recurrent states do not."""
    return all(type(layer) in (*_MASKABLE, GrowingLayer) for layer in cache.layers)


def can_have_holes(cache: Cache, config: PreTrainedConfig) -> bool:
    """Whether rejected tokens may stay in the cache behind a mask."""
    return keeps_every_token(cache) and config.model_type not in _BY_COLUMN


class CachedModel:
    """A causal LM, its cache, and which columns of that belong to which text; it holds `read` of each already.

    Attributes:
        read: Columns of each text in the cache.
        num_unread: Columns at a text's end that the next piece begins with; the last token is always one of them.
        drops_rows: Whether finished texts can be let go.
    """

    num_unread = 1
    drops_rows = True

    def __init__(self, model: PreTrainedModel, cache: Cache, texts: Texts, read: int = 0) -> None:
        parameters = inspect.signature(model.forward).parameters
        self.model, self.cache = model, cache
        self.read = [read] * len(texts.lengths)
        self._padding = list(texts.padding)
        self._is_single = texts.is_single
        self._takes_positions = "position_ids" in parameters
        self._takes_number = "logits_to_keep" in parameters
        self._columns = read
        self._needs_mask = texts.needs_mask
        # A cache that is continued holds the padding of its text too.
        columns = torch.arange(read + 64, device=texts.ids.device)
        self._mask = columns >= texts.ids.new_tensor(texts.padding)[:, None]

    def __call__(self, piece: Piece, num_logits: int) -> Tensor:
        """Read a piece; return the logits [A, num_logits, V] of its last tokens."""
        width = piece.ids.shape[1]
        end = self._columns + width
        inputs: dict[str, Any] = {"input_ids": piece.ids, CACHE: self.cache, "use_cache": True}
        if self._needs_mask:
            inputs["attention_mask"] = self._masked(piece, end)
        if self._takes_positions:
            inputs["position_ids"] = piece.positions
        if self._takes_number:
            inputs["logits_to_keep"] = num_logits
        self._columns = end
        return self.model(**inputs).logits[:, -num_logits:]

    def _masked(self, piece: Piece, end: int) -> Tensor:
        if end > self._mask.shape[1]:
            self._mask = torch.nn.functional.pad(self._mask, (0, end + end // 2 - self._mask.shape[1]), value=True)
        self._mask[:, self._columns : end] = True if piece.is_token is None else piece.is_token
        return self._mask[:, :end]

    def keep(self, lengths: list[int]) -> None:
        """Forget rejected tokens: what was read behind the first `lengths` columns of each row's text."""
        surplus = [max(0, seen - length) for seen, length in zip(self.read, lengths, strict=True)]
        self.read = [seen - extra for seen, extra in zip(self.read, surplus, strict=True)]
        common = min(surplus)
        if self._columns:  # a window that holds nothing yet cannot be cropped
            _roll_back(self.cache, common)
        self._columns -= common
        if max(surplus) > common:
            # Pieces end in the same column in all rows (`Texts.piece`): what a row has rejected beyond the others are
            # its last columns. They are counted from the end here.
            left = torch.tensor([extra - common for extra in surplus], device=self._mask.device)[:, None]
            columns = torch.arange(max(surplus) - common, 0, -1, device=self._mask.device)
            self._mask[:, self._columns - len(columns) : self._columns] &= columns > left

    def keep_rows(self, places: list[int]) -> None:
        """Drop the rows of finished texts, and holes with them; `places` are the rows that stay."""
        self.read = [self.read[place] for place in places]
        self._padding = [self._padding[place] for place in places]
        rows = torch.tensor(places, device=self._mask.device)
        mask = self._mask[rows, : self._columns]
        # A stable sort puts what is masked to the left, as padding is, and keeps the order of the tokens.
        columns = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, self._columns - self._most_tokens() :]
        if self._columns:  # layers that have read nothing yet hold nothing
            _gather(self.cache, rows, columns)
        self._columns = columns.shape[1]
        self._mask = torch.nn.functional.pad(mask.gather(1, columns), (0, 64 + self._columns // 2), value=True)

    def squeeze_if_worthwhile(self, num_new: int) -> None:
        """Close the holes once reading over them has cost as much as moving the tokens will.

        Moving L tokens costs about what reading 2 L does. With g new holes a round, squeezing every r rounds costs
        2L/r + gr/2 a round, which is least where the holes gr have reached 2·√(gL). A round adds `num_new` columns.
        """
        holes = self._columns - self._most_tokens()
        if not self._is_single and holes > 2 * (num_new * self._columns) ** 0.5:
            self.keep_rows(list(range(len(self.read))))

    def _most_tokens(self) -> int:
        return max(seen - padding for seen, padding in zip(self.read, self._padding, strict=True))


def _roll_back(cache: Cache, count: int) -> None:
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            if count and isinstance(layer, StaticLayer):
                layer.cumulative_length.sub_(count)
    else:
        # Layers with a window drop what has left it here, even where nothing is rolled back.
        cache.crop(-count)


def _gather(cache: Cache, rows: Tensor, columns: Tensor) -> None:
    """Keep `columns` [A, C] of `rows` [A], in place where a layer is static."""
    for layer in cache.layers:
        if isinstance(layer, DummyLayer):
            continue
        for name in ("keys", "values"):
            states = getattr(layer, name)  # on the layer's own device, where a model is spread over several
            index = columns.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            kept = states[rows.to(states.device)].gather(2, index)
            if isinstance(layer, StaticLayer):
                states[:, :, : columns.shape[1]] = kept
            else:
                setattr(layer, name, kept)
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.fill_(columns.shape[1])
