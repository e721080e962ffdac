"""Looking at every position of several models without gradient, a chunk of positions at a time.

Evaluation and the choice of tokens need more than the loss: figures per position that depend on whole distributions.
Here they get the logits of one chunk after the other, so that `[tokens, vocabulary]` is never held, as in training.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_draftkd.acceptance.tensors import at_least_float32
from hf_draftkd.losses.chunked import Reused, Unprojected, chunk_rows, logits_of, prepared

# Logits of one chunk and one model, in elements: 64 MiB of float32 on a CPU. What looks at them makes a few copies.
_CPU_CHUNK = 2**24
_GPU_CHUNK = 2**26


@torch.no_grad()
def scan(sources: Sequence[Any], look: Callable[..., None], chunk_size: int | None = None) -> None:
    """Call `look(rows, *parts)` for one chunk of positions after the other.

    Args:
        sources: What is known of N positions, the first of them not None. Each is logits `[N, V]`, `Unprojected`
            hidden states `[N, H]` with their head, a `SparseTarget` or `SampledTarget`, or None.
        look: Takes the slice of positions and, for each source, its part: logits `[n, V]` in float32 or float64 with
            the values that the model itself gives in its own precision; a sparse or sampled target; None. It must
            neither keep logits nor write into them: they are overwritten by the next chunk. It is not called if
            there is no position.
        chunk_size: Positions at once; None for a size that keeps the logits of a chunk within a fixed budget.
    """
    first = sources[0]
    inputs, vocab_size = (
        (first.hidden, first.head.weight.shape[0]) if isinstance(first, Unprojected) else (first, first.shape[-1])
    )
    if chunk_size is None:
        chunk_size = max(16, (_CPU_CHUNK if inputs.device.type == "cpu" else _GPU_CHUNK) // vocab_size)
    ready = [prepared(each) if isinstance(each, torch.Tensor | Unprojected) else each for each in sources]
    memories = [Reused() for _ in ready]
    with torch.autocast(inputs.device.type, enabled=False):
        for rows in chunk_rows(inputs.shape[0], vocab_size, inputs.device, chunk_size):
            look(rows, *(_part(each, rows, memory) for each, memory in zip(ready, memories, strict=True)))


def _part(source: Any, rows: slice, memory: Reused) -> Any:
    if isinstance(source, Unprojected):
        logits = logits_of(source, rows, memory)
        # A model that computes in half precision rounds its logits: of two that are nearly equal, decoding takes the
        # first, so figures on greedy decoding have to see them rounded as well.
        return at_least_float32(logits.to(source.hidden.dtype))
    if isinstance(source, torch.Tensor):
        return at_least_float32(source[rows])
    return None if source is None else source[rows]
