"""Logits in chunks of positions, so that `[tokens, vocabulary]` is never held.

The models hand over hidden states `[N, H]` and their heads instead of logits.

- `chunked_loss` trains: each chunk of positions is projected, scored, and its gradient carried straight back to hidden
  states and head weight, all in the forward pass; backward only multiplies by the incoming scalar. So each logit is
  computed once, and nothing of a chunk outlives it.
- `scan` looks without gradient: evaluation and the choice of tokens need numbers per position that depend on whole
  distributions of several models.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from hf_draftkd.acceptance.tensors import at_least_float32
from hf_draftkd.losses.gradients import Reused, Twin

# Logits of one chunk, in elements: 64 MiB of float32 on a CPU, 256 MiB on a GPU. Fewer slow the matrix products down,
# more only take memory.
_CPU_CHUNK = 2**24
_GPU_CHUNK = 2**26
# Positions of a chunk at least, however large the vocabulary is.
_LEAST_POSITIONS = 16
# Logits worked on at once within a chunk on a CPU: bounds temporaries to 8 MiB each. Smaller blocks lose more time in
# starting threads than they gain in cache.
_CPU_BLOCK = 2**21
# What the largest gradient of a chunk is scaled to before it becomes float16, as a power of two: below the format's
# largest number, 65504, so that as little as possible falls under its smallest.
_HALF_RANGE = 14


class LinearHead(NamedTuple):
    """A language-model head as arithmetic: logits = softcap · tanh(scale · (h Wᵀ + b) / softcap)."""

    weight: torch.Tensor
    """`[V, H]`; the full tensor, gathered if it is sharded."""
    bias: torch.Tensor | None = None
    """`[V]`."""
    scale: float = 1.0
    """What the model multiplies its logits by (Cohere's `logit_scale`, one over Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Gemma's `final_logit_softcapping`."""

    def first(self, vocab_size: int) -> "LinearHead":
        """Return the head over the first `vocab_size` tokens: the vocabulary a pair shares, without padded rows."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return self._replace(weight=self.weight[:vocab_size], bias=bias)


class Unprojected(NamedTuple):
    """Logits not yet computed: hidden states and the head that would project them."""

    hidden: torch.Tensor
    """`[..., H]`."""
    head: LinearHead


ChunkLoss = Callable[[slice, torch.Tensor, bool], Twin]
"""`(rows, draft_logits [n, V] (may be overwritten), gradient wanted) -> Twin`."""


def chunked_loss(
    draft: torch.Tensor | Unprojected, chunk_loss: ChunkLoss, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return Σ weights · values over all positions, a chunk of positions at a time.

    Args:
        draft: Logits `[N, V]`, or hidden states `[N, H]` with their head.
        chunk_loss: Gives the values and the gradient of one chunk of positions.
        weights: `[N]`, what each position's value is multiplied by; constant.

    Returns:
        The loss, a scalar with gradient to the draft: without any position a finite 0 that keeps its gradient path.
        Without gradient the values `[N]`, and the acceptance rates `[N]` if the chunks computed them.
    """
    inputs, head = draft if isinstance(draft, Unprojected) else (draft, None)
    weight, bias = (None, None) if head is None else (head.weight, head.bias)
    chunks, training = chunks_of(draft), torch.is_grad_enabled()
    return _ChunkedLossFunction.apply(inputs, weight, bias, head, chunk_loss, weights, chunks, training)


@torch.no_grad()
def scan(sources: Sequence[Any], look: Callable[..., None]) -> None:
    """Call `look(rows, *parts)` for one chunk of positions after the other.

    Args:
        sources: What is known of N positions; the first decides the chunks and is not None. Each is logits `[N, V]`,
            `Unprojected` hidden states `[N, H]` with their head, a `SparseTarget` or `SampledTarget`, or None.
        look: Takes the slice of positions and, for each source, its part: logits `[n, V]` in float32 or float64 with
            the values that the model itself gives in its own precision; a sparse or sampled target; None. It must
            neither keep logits nor write into them: the next chunk overwrites them.
    """
    ready = [prepared(each) if isinstance(each, torch.Tensor | Unprojected) else each for each in sources]
    memories = [Reused() for _ in ready]
    with torch.autocast(positions_of(sources[0]).device.type, enabled=False):
        for rows in chunks_of(sources[0]):
            look(rows, *(_part(each, rows, memory) for each, memory in zip(ready, memories, strict=True)))


def _part(source: Any, rows: slice, memory: Reused) -> Any:
    if isinstance(source, Unprojected):
        logits = logits_of(source, rows, memory)
        # A model that computes in half precision rounds its logits: of two that are nearly equal, decoding takes the
        # first, so metrics of greedy decoding must see them rounded as well.
        return at_least_float32(logits.to(source.hidden.dtype))
    if isinstance(source, torch.Tensor):
        return at_least_float32(source[rows])
    return None if source is None else source[rows]


def positions_of(source: torch.Tensor | Unprojected) -> torch.Tensor:
    """Return what a source holds for each position: logits, or hidden states."""
    return source.hidden if isinstance(source, Unprojected) else source


def chunks_of(source: torch.Tensor | Unprojected) -> list[slice]:
    """The slices of N positions to work through, in order, of logits `[N, V]` or hidden states `[N, H]` with their
    head: as many positions at once as keep a chunk's logits at 64 MiB (256 MiB on a GPU).
    """
    positions = positions_of(source)
    vocab_size = source.head.weight.shape[0] if isinstance(source, Unprojected) else source.shape[-1]
    budget = _CPU_CHUNK if positions.device.type == "cpu" else _GPU_CHUNK
    return _slices(len(positions), max(_LEAST_POSITIONS, budget // vocab_size))


def blocks_within(logits: torch.Tensor) -> list[slice]:
    """Return the slices of a chunk's rows `[n, V]` to work on one after the other; a single one on a GPU."""
    rows, vocab_size = logits.shape
    return _slices(rows, max(1, _CPU_BLOCK // vocab_size) if logits.device.type == "cpu" else max(rows, 1))


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def prepared(source: torch.Tensor | Unprojected) -> torch.Tensor | Unprojected:
    """Return the source detached, and hidden states with their head in the type to project in: once, not per chunk."""
    if not isinstance(source, Unprojected):
        return source.detach()
    dtype = _compute_dtype(source.hidden)
    head = source.head._replace(weight=source.head.weight.detach().to(dtype))
    return Unprojected(source.hidden.detach().to(dtype), head)


def logits_of(source: torch.Tensor | Unprojected, rows: slice, memory: Reused) -> torch.Tensor:
    """Logits `[n, V]` of some positions of a `prepared` source, in float32 or float64; they may be overwritten.

    They are projected into `memory`, over what was returned with it before, and never lie in the memory of the source.
    """
    if isinstance(source, Unprojected):
        return _project(source.hidden[rows], source.head, memory)
    return source[rows].to(at_least_float32(source[:0]).dtype, copy=True)


class _ChunkedLossFunction(torch.autograd.Function):
    """Forward computes the gradients as well; backward hands them out.

    They are scaled in place, so there is one backward pass per forward: a second copy of the head's gradient, for a
    `retain_graph` that training never asks for, would cost as much memory as the head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        head: LinearHead | None,
        chunk_loss: ChunkLoss,
        weights: torch.Tensor,
        chunks: list[slice],
        training: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        wanted = tuple(training and needed for needed in ctx.needs_input_grad[:3])
        collect = _Gradients(inputs, weight, bias, wanted)
        source = prepared(inputs if head is None else Unprojected(inputs, head))
        values, acceptance = [], []
        memory = Reused()
        with torch.autocast(inputs.device.type, enabled=False):
            for chunk in chunks:
                logits = logits_of(source, chunk, memory)
                # The soft-cap's slope needs them, and the divergence writes over them.
                capped = logits.clone() if head is not None and head.softcap is not None and any(wanted) else None
                twin = chunk_loss(chunk, logits, any(wanted))
                values.append(twin.values)
                acceptance.append(twin.acceptance)
                if twin.gradient is not None:
                    collect.add(chunk, twin.gradient, source, weights[chunk], capped)
        ctx.gradients = collect.finish()
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (inputs, weight, bias)]
        joined = torch.cat(values) if values else at_least_float32(inputs).new_zeros(0)
        known = [rate for rate in acceptance if rate is not None]
        rates = torch.cat(known) if known else None
        loss = (joined * weights).sum()
        ctx.mark_non_differentiable(joined, *([] if rates is None else [rates]))
        return loss, joined, rates

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The chunked loss can be differentiated once; its gradients were already handed out.")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(grad_loss.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


class _Gradients:
    """Sums of the gradients of inputs, head weight and head bias over chunks."""

    def __init__(
        self,
        inputs: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        wanted: tuple[bool, ...],
    ) -> None:
        self.like = (inputs, weight, bias)
        self.inputs = torch.zeros_like(inputs, dtype=_held_in(inputs.dtype)) if wanted[0] else None
        # Summed over chunks, so in float32 whatever the weights are held in.
        self.weight, self.bias = (
            None if tensor is None or not want else torch.zeros_like(tensor, dtype=at_least_float32(tensor[:0]).dtype)
            for tensor, want in ((weight, wanted[1]), (bias, wanted[2]))
        )

    def add(
        self,
        chunk: slice,
        gradient: torch.Tensor,
        source: torch.Tensor | Unprojected,
        weights: torch.Tensor,
        capped: torch.Tensor | None,
    ) -> None:
        """Carry one chunk's gradient in the logits `[n, V]` back to what the logits were computed from.

        With logits = softcap · tanh(scale · (h Wᵀ + b) / softcap), and the softcap's slope 1 − (logits/softcap)² taken
        into the gradient g: ∂h = scale · g W, ∂W = scale · gᵀ h and ∂b = scale · Σ g, each row times its weight.
        """
        column = weights.to(gradient.dtype).unsqueeze(-1)
        if not isinstance(source, Unprojected):
            if self.inputs is not None:
                self.inputs[chunk] = gradient.mul_(column).to(self.inputs.dtype)
            return
        hidden, head = source
        if capped is not None and head.softcap is not None:
            gradient.mul_(1 - capped.div_(head.softcap).square_())
        # Weights multiply the narrow side, [n, H], instead of passing over [n, V] once more.
        column = column * head.scale
        if self.bias is not None:
            self.bias.add_(gradient.t() @ column.squeeze(-1))
        if hidden.dtype == torch.float16:
            self._add_in_half(chunk, gradient, source, column)
            return
        narrow = gradient.to(hidden.dtype)
        if self.inputs is not None:
            self.inputs[chunk] = (narrow @ head.weight).mul_(column).to(self.inputs.dtype)
        if self.weight is not None:
            weighted = (hidden[chunk] * column).to(hidden.dtype)
            if self.weight.dtype == narrow.dtype:
                self.weight.addmm_(narrow.t(), weighted)
            else:
                self.weight.add_(narrow.t() @ weighted)

    def _add_in_half(self, chunk: slice, gradient: torch.Tensor, source: Unprojected, column: torch.Tensor) -> None:
        """Multiply float16 by float16, both scaled up so that nothing underflows; the scale comes off in float32.

        A loss scaler cannot help here: its factor arrives in backward.
        """
        scale = _to_half_range(gradient)
        narrow = torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=torch.float16))
        if self.inputs is not None:
            self.inputs[chunk] = _float32_product(narrow, source.head.weight).mul_(column / scale)
        if self.weight is not None:
            # Equal weights become exactly 1, so hidden states are not rounded a second time.
            largest = column.abs().amax().clamp_(min=torch.finfo(column.dtype).tiny)
            weighted = (source.hidden[chunk] * (column / largest)).to(torch.float16)
            self.weight.add_(_float32_product(narrow.t(), weighted).mul_(largest / scale))

    def finish(self) -> list[torch.Tensor | None]:
        """Return the gradients, those of float16 tensors still in float32."""
        return [
            None if gradient is None or tensor is None else gradient.to(_held_in(tensor.dtype))
            for gradient, tensor in zip((self.inputs, self.weight, self.bias), self.like, strict=True)
        ]


def _held_in(dtype: torch.dtype) -> torch.dtype:
    """Return the type to keep a gradient in until the loss scaler's factor is known: float16 would lose it."""
    return torch.float32 if dtype == torch.float16 else dtype


def _to_half_range(gradient: torch.Tensor) -> torch.Tensor:
    """Return the power of two, a scalar, that brings the largest entry near the top of float16; without a sync."""
    exponent = torch.linalg.vector_norm(gradient, float("inf")).log2().floor()
    # Bounds for a chunk of zeros. NaN goes through, and stays one in what is multiplied by it.
    return torch.exp2(_HALF_RANGE - exponent.clamp_(-60, 60))


def _float32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the product of two float16 matrices in float32: in float16 it would be rounded, or overflow."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _project(hidden: torch.Tensor, head: LinearHead, memory: Reused) -> torch.Tensor:
    """Return float32 (or float64) logits `[n, V]`; hidden and weight share one type."""
    if hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16):
        logits = torch.mm(hidden, head.weight.t(), out_dtype=torch.float32)
    elif hidden.device.type == "cpu" and hidden.dtype in (torch.float32, torch.float64):
        out = memory.take("logits", hidden, hidden.shape[0], head.weight.shape[0])
        logits = torch.mm(hidden, head.weight.t(), out=out)
    else:
        logits = at_least_float32(hidden @ head.weight.t())
    if head.bias is not None:
        logits.add_(head.bias)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the type to project in: autocast's where it is on, else that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
