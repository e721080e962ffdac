"""Next-token training on packed text, resumable, with a schedule that depends on the number of steps alone."""

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IGNORED = -100  # label that the loss leaves out


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: warm-up, a constant stretch, then a linear decay to zero.

    The constant stretch makes the run's end a late choice: up to the decay, runs of different lengths are the same run.
    """

    steps: int
    tokens_per_step: int = 8192
    tokens_per_micro_batch: int = 4096
    sequence_length: int = 256
    long_sequence_length: int = 512  # during the decay, so that longer positions are known too
    warmup_steps: int = 40
    decay_share: float = 0.33
    matrix_learning_rate: float = 0.02
    other_learning_rate: float = 0.004

    def scale(self, step: int) -> float:
        """Factor on both learning rates at `step`."""
        decay_steps = max(1, round(self.steps * self.decay_share))
        return min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / decay_steps)

    def length_at(self, step: int) -> int:
        """Tokens per sequence at `step`."""
        return self.long_sequence_length if step > self.warmup_steps and self.scale(step) < 1 else self.sequence_length


def base_config(tokenizer: PreTrainedTokenizerFast, *, draft: bool = False, smoke: bool = False) -> LlamaConfig:
    """Shape of the base model and target (7.5M parameters, deep), or of the draft (0.7M, one layer)."""
    layers, hidden, intermediate, heads = (1, 128, 352, 2) if draft else (8, 256, 704, 4)
    if smoke:
        layers, hidden, intermediate, heads = min(layers, 2), hidden // 4, intermediate // 4, 2
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model. At these lengths plain attention is faster on a CPU than the fused kernel."""
    torch.manual_seed(seed)
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def autocast() -> torch.autocast:
    """bfloat16 matrix products where the CPU has instructions for them; weights and optimizer stay float32.

    Such a CPU does them about twice as fast; one that has to emulate them is far slower.
    """
    found = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16, enabled=any(found.get(each) for each in ("avx512_bf16", "amx_bf16")))


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms; Muon needs far fewer tokens to get as far."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.0, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def set_learning_rates(pair: list[torch.optim.Optimizer], matrices: float, others: float) -> None:
    """Give the two optimizers of `optimizers` their rates for the next step."""
    for optimizer, rate in zip(pair, (matrices, others), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate


def batch_at(stream: np.ndarray, step: int, length: int, tokens: int, seed: int) -> Tensor:
    """The token ids [tokens / length, length] of a step: windows of the stream, each seen once per epoch.

    Each epoch cuts the stream at another offset. The batch is a function of (step, length, seed) alone.
    """
    rows = tokens // length
    windows = (len(stream) - length) // length
    epoch, first = divmod(step * rows, windows)
    generator = np.random.default_rng((seed, epoch, length))
    offset, order = generator.integers(length), generator.permutation(windows)
    picked = [order[(first + row) % windows] * length + offset for row in range(rows)]
    return torch.from_numpy(np.stack([stream[start : start + length] for start in picked]).astype(np.int64))


def next_token_loss(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over predicted positions of the negative log-likelihood, in nats. `ids`, `labels`: [B, T]."""
    with autocast():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def held_out_loss(model: nn.Module, stream: np.ndarray, length: int = 512, rows: int = 8) -> float:
    """Mean nats per token over windows of `length` tokens of held-out text, read without overlap."""
    model.eval()
    usable = len(stream) // length
    windows = torch.from_numpy(stream[: usable * length].reshape(usable, length).astype(np.int64))
    total = sum(float(next_token_loss(model, ids, ids)) for ids in windows.split(rows))
    model.train()
    return total / (usable * (length - 1))


def write_atomically(path: Path, state: object) -> None:
    """Save so that an interruption leaves the last complete file in place."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def pretrain(
    config: LlamaConfig,
    stream: np.ndarray,
    held_out: np.ndarray,
    schedule: Schedule,
    directory: Path,
    *,
    seed: int,
    checkpoint_every: int = 50,
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train a new model on `stream` [N], or resume from the checkpoint in `directory`; return it with its metrics."""
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = directory / "checkpoint.pt"
    model = new_model(config, seed)
    pair = optimizers(model)
    step, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(pair, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, seconds = saved["step"], saved["seconds"]
    model.train()
    began, running = time.perf_counter() - seconds, math.nan
    while step < schedule.steps:
        length = schedule.length_at(step)
        ids = batch_at(stream, step, length, schedule.tokens_per_step, seed)
        total = 0.0
        for part in ids.split(max(1, schedule.tokens_per_micro_batch // length)):
            loss = next_token_loss(model, part, part) / (ids.shape[0] * (length - 1))
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"The loss at step {step} is {total}; the last good checkpoint is {checkpoint}.")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = schedule.scale(step)
        set_learning_rates(pair, scale * schedule.matrix_learning_rate, scale * schedule.other_learning_rate)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        running = total if math.isnan(running) else 0.9 * running + 0.1 * total
        if step % 10 == 0:
            rate = step * schedule.tokens_per_step / (time.perf_counter() - began)
            print(f"step {step}/{schedule.steps} loss {running:.3f} {rate:.0f} tokens/s", flush=True)
        if step % checkpoint_every == 0 or step == schedule.steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in pair],
                "step": step,
                "seconds": time.perf_counter() - began,
            }
            write_atomically(checkpoint, state)
    figures = {
        "seconds": round(time.perf_counter() - began, 1),
        "tokens": schedule.steps * schedule.tokens_per_step,
        "held_out_nats_per_token": held_out_loss(model, held_out),
        "schedule": asdict(schedule),
    }
    return model, figures
