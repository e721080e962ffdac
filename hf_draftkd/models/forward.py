"""One forward pass of a causal LM that projects only the positions asked for, or none at all.

Logits are large because the vocabulary is, and most positions of a batch (prompts, padding) are never used. The
positions are chosen in front of the head, inside the model's own forward, so that wrappers (DDP, FSDP, PEFT) run as
always and whatever the model does after its head (scaling, soft-capping) still happens.

Where the head is plain arithmetic (`head_arithmetic`), the loss can take the hidden states instead and project them a
chunk at a time: `hidden_at` and `in_head` never hold logits of all positions.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_draftkd.losses import LinearHead, Unprojected

# What a model takes its key-value cache by, and returns it under: renamed in transformers 5.24.
CACHE = "cache" if "cache" in {each.name for each in fields(CausalLMOutputWithPast)} else "past_key_values"

_PROBE_LENGTH = 8


def predicting_positions(labels: Tensor) -> Tensor:
    """Where [B, L] a token that counts is predicted: True at t where `labels[:, t + 1]` [B, L] is not -100.

    The last column is False.
    """
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != -100
    return keep


def logits_at(model: nn.Module, inputs: Mapping[str, Any], keep: Tensor) -> Tensor:
    """Next-token logits at chosen positions.

    Args:
        model: A causal LM, wrapped or not (DDP, FSDP, PEFT).
        inputs: What its forward takes: `input_ids` [B, L] and, as the batch needs, `attention_mask` or `position_ids`.
        keep: [B, L] bool, N of them True.

    Returns:
        [N, V] logits in row-major order of `keep`, in the model's own dtype.
    """
    head = unwrapped(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][keep.to(args[0].device)], *args[1:]))
    try:
        with _without_routing_loss(model):
            return model(**_placed(model, inputs), use_cache=False).logits
    finally:
        handle.remove()


def _placed(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs on the model's device: a target may be on another one than the draft."""
    device = unwrapped(model).get_input_embeddings().weight.device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


class HeadArithmetic(NamedTuple):
    """What a model does with the product of hidden states and head weight."""

    scale: float
    """What it multiplies it by."""
    softcap: float | None
    """What it bounds it to, by tanh."""


@torch.no_grad()
def head_arithmetic(model: nn.Module) -> HeadArithmetic | None:
    """Find out what a model does between its head and its logits by returning known numbers in the head's place.

    Scaling and soft-capping are found whatever an architecture calls them, and anything else is noticed.

    Args:
        model: A causal LM, wrapped or not; its parameters are not read.

    Returns:
        The arithmetic; None where the logits are not scale and soft-cap of a plain linear layer's output (an adapter
        or quantised weights on the head, offloaded weights, an unusual model).
    """
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    # A module has a `forward` among its variables where accelerate moves its weights.
    if type(head) is not nn.Linear or "forward" in vars(head) or head.weight.numel() == 0 or head._forward_hooks:
        return None
    # Numbers of both signs over ten powers of ten. A soft-cap leaves the smallest alone, which show the scale, and the
    # largest become the cap itself, where tanh is 1. Those between must follow from the two, or something else is done.
    probe = torch.logspace(-4, 6, head.weight.shape[0], device=head.weight.device)
    probe[::2] *= -1
    with evaluating(inner), _instead_of_head(head, lambda _: probe[None, None].clone()):
        found = inner(torch.zeros(1, 1, dtype=torch.long, device=inner.device), use_cache=False).logits
    if found.shape != (1, 1, len(probe)):
        return None
    # Not every accelerator has float64.
    found, probe = found[0, 0].cpu().double(), probe.cpu().double()
    scale = float(found[0] / probe[0])
    last = abs(float(found[-1]))
    softcap = None if last > 0.999 * abs(scale * float(probe[-1])) else last
    expected = scale * probe if softcap is None else softcap * torch.tanh(scale * probe / softcap)
    if not torch.allclose(found, expected, rtol=1e-5, atol=0):
        return None
    return HeadArithmetic(1.0 if abs(scale - 1) < 1e-6 else scale, softcap)


@torch.no_grad()
def reads_left_to_right(model: nn.Module) -> bool:
    """Whether logits do not depend on the tokens that follow, tried on two texts with the same beginning.

    CPM-Ant reads what it is given as a prompt in both directions, as models with code of their own may. A `ValueError`
    where the logits are NaN: sampling from them fails in torch, and greedy decoding writes one token again and again.
    """
    inner = unwrapped(model)
    weight = inner.get_input_embeddings().weight
    if weight.is_meta or weight.numel() == 0:  # not loaded yet, or sharded
        return True
    ids = torch.arange(_PROBE_LENGTH, 2 * _PROBE_LENGTH, device=weight.device).repeat(2, 1)
    ids[1, _PROBE_LENGTH // 2 :] += _PROBE_LENGTH
    with evaluating(inner):
        logits = inner(ids % weight.shape[0], use_cache=False).logits[:, : _PROBE_LENGTH // 2].float()
    one, other = logits.to("cpu")
    if one.isnan().any():
        raise ValueError(
            f"The logits of {inner.name_or_path or type(inner).__name__!r} are NaN: its weights are broken, or its "
            f"numbers are too large for {inner.dtype}. Load it in another `dtype`, or download or save it again."
        )
    # Half of them, since a tie of experts, decided by rounding, may change some.
    return not bool(((one - other).norm(dim=-1) > 0.01 * one.norm(dim=-1)).float().median())


def hidden_at(
    model: nn.Module, inputs: Mapping[str, Any], keep: Tensor, arithmetic: HeadArithmetic, vocab_size: int
) -> Unprojected:
    """What `logits_at` would project: hidden states [N, H] at chosen positions, with the head over `vocab_size` tokens.

    For a model whose head keeps its weights after its forward: not one sharded by FSDP or ZeRO.
    """
    return in_head(model, inputs, keep, arithmetic, vocab_size, lambda source: (source, source.hidden[:0]))


def in_head(
    model: nn.Module,
    inputs: Mapping[str, Any],
    keep: Tensor,
    arithmetic: HeadArithmetic | None,
    vocab_size: int,
    compute: Callable[[Any], tuple[Any, Tensor]],
) -> Any:
    """Compute anything where the model would have projected its hidden states: there the head's weight is whole,
    whoever shards it.

    `compute` takes hidden states [N, H] at the positions [B, L] `keep`, with the head over the first `vocab_size`
    tokens, or logits [N, V] where there is no `head_arithmetic`. It returns the result, which is returned, and what the
    model's forward returns. `inputs` are what that takes.
    """
    if arithmetic is None:
        return compute(logits_at(model, inputs, keep)[:, :vocab_size])[0]
    head = unwrapped(model).get_output_embeddings()
    results = []

    def forward(hidden: Tensor) -> Tensor:
        linear = LinearHead(head.weight, head.bias, *arithmetic)
        if vocab_size < head.weight.shape[0]:
            linear = linear.first(vocab_size)
        result, output = compute(Unprojected(hidden[keep.to(hidden.device)], linear))
        results.append(result)
        # The model's output is part of the graph, as wrappers that watch it expect.
        return output.reshape(1, 1, -1)

    with _instead_of_head(head, forward), _without_routing_loss(model):
        model(**_placed(model, inputs), use_cache=False)
    (result,) = results
    return result


@contextmanager
def _instead_of_head(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside data-parallel, compile and PEFT wrappers."""
    if isinstance(model, PreTrainedModel) and "_orig_mod" not in vars(model):
        return model  # at once, since accelerate looks for deepspeed on the disk whenever it is asked
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    if isinstance(model, PeftModel):
        return unwrapped(model.get_base_model())
    inner = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    return model if inner is model else unwrapped(inner)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Dropout and load-balancing losses off, and every model put back afterwards as it was."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with _without_routing_loss(*models):
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


@contextmanager
def _without_routing_loss(*models: nn.Module) -> Iterator[None]:
    """No load-balancing loss of a mixture of experts (`output_router_logits`), which distillation has no use for.

    It takes the routing of the tokens that are read and a mask [B, L] of the whole text: with a cache, which holds the
    rest of the text, or with the mask of a parallel draft's blocks it fails.
    """
    configs = {id(config): config for model in models if (config := getattr(unwrapped(model), "config", None))}
    routed = [config for config in configs.values() if getattr(config, "output_router_logits", False)]
    for config in routed:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in routed:
            config.output_router_logits = True


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers that follow from `seed`; the global state on the CPU and on `device` is left alone."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield
