"""The served requests that an online draft learns from, and those that judge it: bounded, and kept apart."""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.losses.sparse import SparseTarget
from hf_draftkd.online.capture import ServedRequest

_RAGGED = ("prompt_ids", "completion_ids")


class ReplayBuffer:
    """The newest requests, oldest first.

    Args:
        size: Requests kept to learn from.
        holdout_size: Requests kept to judge an update.
        holdout_share: Share of the prompts that are held out.
        seed: Decides which.

    Attributes:
        training: Requests to learn from.
        held_out: Requests never learnt from.
        num_new: How many of `training`, counted from the end, no update has seen.
    """

    def __init__(self, size: int, holdout_size: int, holdout_share: float, seed: int) -> None:
        self.training: deque[ServedRequest] = deque(maxlen=size)
        self.held_out: deque[ServedRequest] = deque(maxlen=holdout_size)
        self.num_new = 0
        self._holdout_share, self._seed = holdout_share, seed

    def add(self, request: ServedRequest) -> None:
        """Take up a request; the oldest of its kind makes room."""
        if request.is_held_out(self._holdout_share, self._seed):
            self.held_out.append(request)
            return
        self.training.append(request)
        self.num_new = min(self.num_new + 1, len(self.training))

    def batches(
        self, batch_size: int, num_epochs: int, replay_ratio: float, generator: torch.Generator
    ) -> list[list[ServedRequest]]:
        """What an update learns from: in each epoch every new request once, among older ones drawn without replacement.

        Args:
            batch_size: Requests a batch; the last of an epoch may have fewer.
            num_epochs: Passes over the new requests.
            replay_ratio: Older requests for each new one, as far as there are any.
            generator: Draws and shuffles.
        """
        requests = list(self.training)
        num_older = len(requests) - self.num_new
        made = []
        for _ in range(num_epochs):
            older = torch.randperm(num_older, generator=generator)[: round(replay_ratio * self.num_new)]
            chosen = torch.cat([older, torch.arange(num_older, len(requests))])
            order = chosen[torch.randperm(len(chosen), generator=generator)].tolist()
            made += [
                [requests[index] for index in order[start : start + batch_size]]
                for start in range(0, len(order), batch_size)
            ]
        return made

    def pack(self) -> tuple[dict[str, Tensor], list[dict[str, float] | None]]:
        """Everything as a few tensors, and the decoding settings: training requests first, then the held-out ones."""
        requests = [*self.training, *self.held_out]
        if not requests:
            return {}, []
        tensors = {name: torch.cat([getattr(request, name) for request in requests]) for name in _RAGGED}
        tensors["lengths"] = torch.tensor([[len(getattr(request, name)) for name in _RAGGED] for request in requests])
        for name in ("token_ids", "logprobs", "tail_logprob"):
            tensors[name] = torch.cat([getattr(request.target, name) for request in requests])
        return tensors, [None if (how := request.setting) is None else how.to_dict() for request in requests]

    def unpack(
        self,
        tensors: Mapping[str, Tensor],
        settings: list[dict[str, float] | None],
        num_training: int,
        num_new: int,
    ) -> None:
        """Take up what `pack` gave; if the buffer is smaller now, the newest of it."""
        self.training.clear()
        self.held_out.clear()
        if settings:
            prompt_lengths, completion_lengths = tensors["lengths"].T.tolist()
            target = zip(
                *(tensors[name].split(completion_lengths) for name in ("token_ids", "logprobs", "tail_logprob")),
                strict=True,
            )
            rows = zip(
                tensors["prompt_ids"].split(prompt_lengths),
                tensors["completion_ids"].split(completion_lengths),
                target,
                settings,
                strict=True,
            )
            requests = [
                # Copies: a slice would keep the whole file's tensor alive for as long as one request of it.
                ServedRequest(
                    prompt.clone(),
                    completion.clone(),
                    SparseTarget(*(part.clone() for part in kept)),
                    None if setting is None else DecodingSetting(**setting),  # type: ignore[arg-type]
                )
                for prompt, completion, kept, setting in rows
            ]
            self.training.extend(requests[:num_training])
            self.held_out.extend(requests[num_training:])
        self.num_new = min(num_new, len(self.training))
