"""How good drafts are: exact scores on text of the target, and their own loss on the task."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from lab import Lab, recorded_list
from recipes import TEMPERATURES
from transformers import PreTrainedModel

from hf_draftkd.acceptance.tensors import only_listed
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.scoring import Text, in_one_pass, score_texts

GAMMAS = (3, 5, 7)  # the draft lengths of the three papers' tables


def scores(lab: Lab, drafts: Sequence[PreTrainedModel], name: str) -> list[dict[str, Any]]:
    """`score_drafts` on one of the pair's evaluation texts."""
    return score_drafts(lab.target, drafts, lab.asked(name))


def score_drafts(target: PreTrainedModel, drafts: Sequence[PreTrainedModel], rows: Dataset) -> list[dict[str, Any]]:
    """Exact scores of several drafts on the target's own text, which the target reads once for all of them.

    Args:
        target: The target that wrote the rows.
        drafts: The drafts; one with a list of ids proposes these alone.
        rows: Alignment data, one answer to each prompt at each temperature.

    Returns:
        For each draft: temperature -> columns by prompt, in the order of the prompts: `tokens`, `acceptance` (the sum
        of their acceptance rates) and for each draft length the expected target `calls`; of a parallel draft also
        `parallel_calls`, those of drafting in one pass.
    """
    lists = {place: ids for place, draft in enumerate(drafts) if (ids := recorded_list(draft)) is not None}
    found: list[dict[str, Any]] = [{} for _ in drafts]
    for setting, temperature in TEMPERATURES.items():
        chosen = rows.filter(lambda at, wanted=temperature: at == wanted, input_columns="temperature")
        texts = [Text(*ids) for ids in zip(chosen["prompt_ids"], chosen["completion_ids"], strict=True)]
        result = score_texts(
            target,
            drafts,
            texts,
            DecodingSetting(temperature=temperature),
            vocab_size=target.config.vocab_size,
            draft_vocabularies=list(lists.items()),
            listed_only=True,
        )
        whole, listed = iter(result.drafts), iter(result.listed)
        for place, columns in enumerate(found):
            by_rule = next(listed if place in lists else whole)
            rule, sums = next(iter(by_rule.items()))
            columns[setting] = {
                "tokens": [int(each) for each in sums.num_tokens],
                "acceptance": _rounded(sums.acceptance),
                "calls": _calls(sums.target_calls),
            }
            if in_one_pass(rule) in by_rule:  # of a parallel draft
                columns[setting]["parallel_calls"] = _calls(by_rule[in_one_pass(rule)].target_calls)
    return found


def _calls(target_calls: torch.Tensor) -> dict[str, list[float]]:
    return {str(gamma): _rounded(target_calls[:, gamma - 1]) for gamma in GAMMAS}


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(each, 3) for each in values.tolist()]


@torch.inference_mode()
def own_loss(lab: Lab, draft: PreTrainedModel) -> dict[str, float]:
    """How well the draft itself knows the task: the summed loss on the right answers in nats, and their tokens.

    Of a draft with a list of ids these are the tokens that it lists, among which alone it chooses.
    """
    nats, count = 0.0, 0
    ids = recorded_list(draft)
    listed = torch.tensor(range(draft.config.vocab_size) if ids is None else ids)
    for prompt, completion in zip(lab.right_answers["prompt_ids"], lab.right_answers["completion_ids"], strict=True):
        text, wanted = torch.tensor([[*prompt, *completion]]), torch.tensor(completion)
        logits = draft(input_ids=text, logits_to_keep=len(wanted) + 1).logits[0, :-1]
        known = torch.isin(wanted, listed)
        loss = torch.nn.functional.cross_entropy(only_listed(logits, listed)[known], wanted[known], reduction="sum")
        nats += loss.item()
        count += int(known.sum())
    return {"nats": round(nats, 3), "tokens": count}
