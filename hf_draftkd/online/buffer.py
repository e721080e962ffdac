"""The served requests that an online draft learns from, and those that judge it: bounded, and kept apart.

The target computed a distribution for each token of a text while it checked the draft. `SpeculativeDecoding` hands them
over round by round, and `KeptDistributions` cuts them to the k likeliest tokens at once, so that learning needs no
further pass of the target and `[tokens, vocabulary]` is never held.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.losses import SparseTarget
from hf_draftkd.utils.hashing import hash_number


@dataclass(frozen=True)
class ServedRequest:
    """A request to learn from.

    Args:
        prompt_ids: [P] int64.
        completion_ids: [T] int64, what the target wrote.
        target: Its distributions [T, k] at these tokens, unprocessed but for the loss temperature.
        setting: How it was decoded; None where that cannot be written as a `DecodingSetting`.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    target: SparseTarget
    setting: DecodingSetting | None


class ReplayBuffer:
    """The newest requests, oldest first: `size` to learn from, and `holdout_size`, of a share of the prompts, that
    judge.

    Attributes:
        training: Requests to learn from.
        held_out: Requests never learned from.
        num_new: How many of `training`, counted from the end, no update has seen.
    """

    def __init__(self, size: int, holdout_size: int, holdout_share: float, seed: int) -> None:
        self.training: deque[ServedRequest] = deque(maxlen=size)
        self.held_out: deque[ServedRequest] = deque(maxlen=holdout_size)
        self.num_new = 0
        self._holdout_share, self._seed = holdout_share, seed

    def add(self, request: ServedRequest) -> None:
        """Take in a request; the oldest of its kind makes room. Its prompt alone decides whether it is held out."""
        if hash_number(f"{self._seed}:{request.prompt_ids.tolist()}") < self._holdout_share * 2**64:
            self.held_out.append(request)
            return
        self.training.append(request)
        self.num_new = min(self.num_new + 1, len(self.training))

    def batches(
        self, batch_size: int, num_epochs: int, replay_ratio: float, generator: torch.Generator
    ) -> list[list[ServedRequest]]:
        """What an update learns from: in each epoch every new request once, among older ones drawn without replacement.

        There are `replay_ratio` older requests for each new one, as far as there are any; the last batch of an epoch
        may be smaller. The generator draws and shuffles.
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

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything as tensors and JSON: training requests first, then the held-out ones."""
        requests = [*self.training, *self.held_out]
        tensors = {
            f"{number}.{name}": tensor
            for number, one in enumerate(requests)
            for name, tensor in {"prompt": one.prompt_ids, "completion": one.completion_ids, **vars(one.target)}.items()
        }
        settings = [None if one.setting is None else one.setting.to_dict() for one in requests]
        return tensors, {"settings": settings, "num_training": len(self.training), "num_new": self.num_new}

    def unpack(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take in what `pack` returned; if the buffer is smaller now, the newest of it."""
        requests = []
        for number, setting in enumerate(facts["settings"]):
            # Copies: what is read from a file may be a view of it.
            prompt, completion, *target = (
                tensors[f"{number}.{name}"].clone()
                for name in ("prompt", "completion", "token_ids", "logprobs", "tail_logprob")
            )
            known = None if setting is None else DecodingSetting(**setting)
            requests.append(ServedRequest(prompt, completion, SparseTarget(*target), known))
        for side, part in (
            (self.training, requests[: facts["num_training"]]),
            (self.held_out, requests[facts["num_training"] :]),
        ):
            side.clear()
            side.extend(part)
        self.num_new = min(facts["num_new"], len(self.training))
