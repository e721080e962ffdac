"""How an online draft learns and how an update is judged: gradient steps on served requests, and a way back."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hf_draftkd.decoding.setting import UNFILTERED, DecodingSetting
from hf_draftkd.evaluation.scoring import Text, score_texts
from hf_draftkd.losses import DistillationLoss, SparseTarget, Unprojected, distillation_loss
from hf_draftkd.models.forward import head_arithmetic, in_head, predicting_positions
from hf_draftkd.online.buffer import ServedRequest
from hf_draftkd.online.config import OnlineDistillConfig


class Learner:
    """A draft, the weights that the optimiser sees, and the optimiser.

    For a float32 draft these weights are its own. A bfloat16 draft learns in float32 copies, which are written back to
    it after each gradient step: small updates are lost in bfloat16. The draft, with an adapter or without, is in
    evaluation mode except inside `learn`.

    Args:
        draft_model: The draft.
        vocab_size: Ids from here on are padding in one of the models.
        args: What to learn, and how.
        vocabulary: Ids that the draft may propose while it serves; None for all.

    Raises:
        ValueError: Nothing can be trained, or weights are float16 or were made under `torch.inference_mode()`.
    """

    def __init__(
        self, draft_model: Any, vocab_size: int, args: OnlineDistillConfig, vocabulary: list[int] | None = None
    ) -> None:
        self._draft, self._vocab_size, self._max_grad_norm = draft_model.eval(), vocab_size, args.max_grad_norm
        self._trained = _trainable(draft_model)
        self._weights = {name: _in_float32(weight) for name, weight in self._trained.items()}
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=args.learning_rate, weight_decay=args.weight_decay
        )
        self._arithmetic = head_arithmetic(draft_model)
        self._needs_target = args.needs_target
        self._objective: dict[str, Any] = {"divergence": "cross_entropy"}
        if args.needs_target:
            self._objective = {
                "divergence": args.divergence,
                "options": args.divergence_options,
                "temperature": args.loss_temperature,
                "cross_entropy_weight": args.cross_entropy_weight,
            }
        if vocabulary is not None:
            self._objective["vocabulary"] = torch.tensor(vocabulary, device=draft_model.device)

    def learn(self, batches: Sequence[Sequence[ServedRequest]]) -> dict[str, float]:
        """Take one gradient step per batch.

        Returns:
            `num_tokens` learned from, and their mean `loss`.

        Raises:
            FloatingPointError: A loss or a gradient is not finite. Steps before it have been taken.
        """
        total, num_tokens = 0.0, 0
        self._draft.train()
        try:
            for batch in batches:
                result = self.loss(batch)
                result.loss.backward()
                self._step(float(result.loss.detach()), len(batch))
                total += float(result.token_losses.cpu().double().sum())
                num_tokens += result.num_tokens
        finally:
            # Serving must see nothing of an update: neither dropout nor memory held by gradients.
            self._draft.eval()
            self._draft.zero_grad()
            self._optimizer.zero_grad()
        return {"num_tokens": num_tokens, "loss": total / num_tokens}

    def _step(self, loss: float, num_requests: int) -> None:
        for name, parameter in self._trained.items():
            if parameter is not self._weights[name] and parameter.grad is not None:
                self._weights[name].grad, parameter.grad = parameter.grad.float(), None
        norm = float(nn.utils.clip_grad_norm_(self._weights.values(), self._max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"loss {loss} and gradient norm {norm} on a batch of {num_requests} requests.")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._write_weights()

    def loss(self, requests: Sequence[ServedRequest]) -> DistillationLoss:
        """The objective on a batch of requests: a mean over their completion tokens."""
        device = self._draft.device
        texts = [torch.cat([request.prompt_ids, request.completion_ids]) for request in requests]
        ids = pad_sequence(texts, batch_first=True)
        labels = pad_sequence(texts, batch_first=True, padding_value=-100)
        inputs = {"input_ids": ids.to(device), "attention_mask": (labels != -100).long().to(device)}
        for row, request in enumerate(requests):
            labels[row, : len(request.prompt_ids)] = -100
        keep = predicting_positions(labels)
        # Row by row in the order of the requests, which is the order of the kept positions.
        tokens, keep = labels[:, 1:][keep[:, :-1]].to(device), keep.to(device)
        target = None
        if self._needs_target:
            kept = SparseTarget.concatenate([request.target for request in requests])
            token_ids, *logprobs = (part.to(device) for part in vars(kept).values())
            target = SparseTarget(token_ids.long(), *logprobs)

        def compare(draft: Tensor | Unprojected) -> tuple[DistillationLoss, Tensor]:
            result = distillation_loss(draft, target, tokens, **self._objective)
            return result, result.loss

        return in_head(self._draft, inputs, keep, self._arithmetic, self._vocab_size, compare)

    @contextmanager
    def undoable(self) -> Iterator[Callable[[], None]]:
        """Yield a function that puts weights and optimiser back as they are now; an error calls it too."""
        weights = {name: weight.detach().clone() for name, weight in self._weights.items()}
        optimizer = copy.deepcopy(self._optimizer.state_dict())

        def undo() -> None:
            self._optimizer.load_state_dict(optimizer)
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(weights[name])
            self._write_weights()

        try:
            yield undo
        except BaseException:
            undo()
            raise

    @torch.no_grad()
    def _write_weights(self) -> None:
        for name, parameter in self._trained.items():
            if parameter is not self._weights[name]:
                parameter.copy_(self._weights[name])

    def state(self) -> dict[str, Tensor]:
        """Weights as they are trained, and the optimiser's moments, by name."""
        names = list(self._weights)
        moments = self._optimizer.state_dict()["state"]
        return {f"weights.{name}": weight for name, weight in self._weights.items()} | {
            f"{kind}.{names[index]}": value for index, kinds in moments.items() for kind, value in kinds.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take in what `state` returned.

        Raises:
            ValueError: It is of another draft.
        """
        saved = {key.removeprefix("weights."): value for key, value in state.items() if key.startswith("weights.")}
        for name in sorted(saved | self._weights):
            there, here = (tuple(of[name].shape) if name in of else "no place" for of in (saved, self._weights))
            if there != here:
                raise ValueError(
                    f"The state belongs to another draft: {name} has {there} there and {here} in this one. Make the "
                    "distiller with the draft that it was saved with."
                )
        moments: dict[int, dict[str, Tensor]] = {}
        index_of = {name: index for index, name in enumerate(self._weights)}
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind != "weights":
                moments.setdefault(index_of[name], {})[kind] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(saved[name])
        self._write_weights()


def acceptance_of(
    drafts: Sequence[Any],
    target_model: PreTrainedModel,
    requests: Iterable[ServedRequest],
    *,
    vocab_size: int,
    batch_size: int,
    vocabulary: list[int] | None,
) -> list[float]:
    """Exact acceptance rate of each draft on served requests, each under its own setting: a ratio of sums.

    The drafts share one pass of the target that served them, and propose one token at a time, of the `vocabulary` if
    there is one.

    Raises:
        FloatingPointError: A model returned NaN or inf.
    """
    by_setting: dict[DecodingSetting, list[Text]] = {}
    for request in requests:
        text = Text(request.prompt_ids.tolist(), request.completion_ids.tolist())
        # Decoding with `min_p` or custom processors cannot be written as a setting.
        by_setting.setdefault(request.setting or UNFILTERED, []).append(text)
    accepted, num_tokens = [0.0] * len(drafts), 0.0
    lists = [] if vocabulary is None else [(draft, vocabulary) for draft in range(len(drafts))]
    for setting, texts in by_setting.items():
        scored = score_texts(
            target_model,
            drafts,
            texts,
            setting,
            vocab_size=vocab_size,
            draft_vocabularies=lists,
            listed_only=True,
            parallel=False,
            batch_size=batch_size,
        )
        by_draft = [next(iter(rules.values())) for rules in scored.listed or scored.drafts]
        accepted = [total + float(sums.acceptance.sum()) for total, sums in zip(accepted, by_draft, strict=True)]
        num_tokens += float(by_draft[0].num_tokens.sum())
    return [total / num_tokens for total in accepted]


def _trainable(draft: Any) -> dict[str, nn.Parameter]:
    trainable = {name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            "The draft has no trainable parameter. Load it with `load_draft`, or add an adapter if it is quantised."
        )
    for name, parameter in trainable.items():
        if parameter.dtype == torch.float16:
            raise ValueError(
                f"The draft's {name} is float16, whose gradients underflow. Load it in bfloat16 or float32."
            )
        if parameter.is_inference():
            raise ValueError(
                f"The draft's {name} was made under `torch.inference_mode()`, and such a tensor can never be trained. "
                "Load the draft outside of it; serving may run inside."
            )
    return trainable


def _in_float32(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.detach().float().requires_grad_()
