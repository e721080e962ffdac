"""Exact acceptance from one forward pass of each model over text the target wrote: no decoding, no sampling noise.

Two halves. `token_scores` and `sum_texts` are pure functions on tensors, which the trainer's evaluation calls too.
`score_texts` runs the models: several drafts beside one target, in batches, a slice of positions at a time, so that
memory grows neither with vocabulary times text length nor with the number of texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, PreTrainedModel

from hf_draftkd.acceptance import (
    DRAFT_LENGTHS,
    accepted_given_output,
    expected_target_calls,
    token_acceptance_rate,
)
from hf_draftkd.acceptance.tensors import only_listed
from hf_draftkd.decoding.processors import logits_processors, process_logits, transformers_draft_processors
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.parallel import ParallelSums, deeper_logits, joined
from hf_draftkd.models.parallel import parallel_draft

EXACT = "exact_match"  # how greedy text is verified, whatever the engine
AS_TRANSFORMERS = "as_transformers"

# Logits held at once by a model, in numbers: 64 MB in float32 on a CPU, 256 MB on an accelerator.
_LOGITS_AT_ONCE, _LOGITS_AT_ONCE_ACCELERATOR = 2**24, 2**26


class Text(NamedTuple):
    """A prompt and what the target wrote after it, as token ids."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]


class TokenScores(NamedTuple):
    """What each position says about a draft.

    Attributes:
        acceptance: `[...]`: α, the expected acceptance of a token drafted here.
        accepted: `[...]`: a_t, the probability that the token in the text had been an accepted draft token.
    """

    acceptance: torch.Tensor
    accepted: torch.Tensor


@dataclass(frozen=True)
class TextSums:
    """Sums per text of one draft, to be added up over texts and divided once.

    Attributes:
        num_tokens: `[N]`, float64: completion tokens.
        acceptance: `[N]`, float64: α summed over tokens.
        target_calls: `[N, 16]`, float64: expected target calls for γ = 1…16.
        accepted: a_t of every token, one float64 tensor per text.
    """

    num_tokens: torch.Tensor
    acceptance: torch.Tensor
    target_calls: torch.Tensor
    accepted: list[torch.Tensor]


@dataclass(frozen=True)
class PassResult:
    """What one pass over the texts of one setting says.

    Attributes:
        drafts: For each draft, in the order given: verification rule → sums. `as_transformers` stands beside the rules
            where transformers' `generate` warps the draft's distribution differently (`transformers_draft_processors`).
        share_plausible: Share of the tokens that this target could have written under the setting: its likeliest one
            when greedy, any with a chance above 0 when sampling.
        listed: The same as `drafts`, for each of the `draft_vocabularies` asked for.
        parallel: For each draft the sums of drafting in one pass a block, by verification rule; none of a draft that is
            not a parallel one.
    """

    drafts: list[dict[str, TextSums]]
    share_plausible: float
    listed: list[dict[str, TextSums]]
    parallel: list[dict[str, ParallelSums]]


def token_scores(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    is_greedy: bool,
    verification: str = "rejection_sampling",
) -> TokenScores:
    """Score positions of texts that the target wrote.

    Args:
        draft_logits: `[..., V]`, over the shared vocabulary only, processed like the target's; for `top_10_draft` by
            temperature alone.
        target_logits: `[..., V]`, processed. The logits of a position are those that chose its token.
        tokens: `[...]`, below V: the tokens the target wrote.
        is_greedy: Whether the texts were decoded greedily; drafts are then verified exactly, whatever the rule.
        verification: How a sampled text is verified, one of `VERIFICATION_RULES`.
    """
    if is_greedy:
        proposed = draft_logits.argmax(-1)
        return TokenScores((proposed == target_logits.argmax(-1)).float(), (proposed == tokens).float())
    return TokenScores(
        token_acceptance_rate(draft_logits, target_logits, verification=verification),
        accepted_given_output(draft_logits, target_logits, tokens, verification=verification),
    )


def sum_texts(scores: TokenScores, mask: torch.Tensor) -> TextSums:
    """Add up scores `[B, T]` over the tokens of each text, where `mask` is true: one run from the left.

    Raises:
        ValueError: The mask has gaps, or scores are no probabilities.
    """
    mask = mask.bool().cpu()
    accepted = scores.accepted.cpu().double()
    return TextSums(
        num_tokens=mask.sum(1).double(),
        acceptance=(scores.acceptance.cpu().double() * mask).sum(1),
        target_calls=expected_target_calls(accepted, DRAFT_LENGTHS, mask),
        accepted=[row[keep] for row, keep in zip(accepted, mask, strict=True)],
    )


@torch.inference_mode()
def score_texts(
    target_model: PreTrainedModel,
    draft_models: Sequence[PreTrainedModel],
    texts: Sequence[Text],
    setting: DecodingSetting,
    *,
    vocab_size: int,
    verification: Sequence[str] = ("rejection_sampling",),
    draft_vocabularies: Sequence[tuple[int, Sequence[int]]] = (),
    batch_size: int = 8,
    on_texts: Callable[[int], Any] = lambda count: None,
) -> PassResult:
    """Run every model once over texts the target wrote under `setting`.

    Args:
        target_model: The target, in evaluation mode.
        draft_models: Drafts with the target's token ids, in evaluation mode.
        texts: Of ids below `vocab_size`; their completion tokens are scored, and sums are in their order.
        setting: How the target decoded them; applied to target and drafts alike.
        vocab_size: Shared vocabulary: ids from here on are padding in one of the models and left out of both.
        verification: Rules for sampled text. Greedy text is always verified exactly: the one rule `exact_match`.
        draft_vocabularies: Pairs of a draft's index and ids: also score that draft had it proposed these ids only. Its
            distribution is masked to them and renormalised before anything else, the target's never is.
        batch_size: Texts per forward pass.
        on_texts: Called with the number of texts done, after every batch.

    Raises:
        FloatingPointError: A model returned NaN or inf.
    """
    order = sorted(range(len(texts)), key=lambda index: sum(map(len, texts[index])))
    scorer = _Scorer(target_model, setting, verification, vocab_size, draft_vocabularies)
    drafts = range(len(draft_models) + len(draft_vocabularies))
    parts: dict[tuple[int, str], list[TextSums]] = {(draft, name): [] for draft in drafts for name in scorer.names}
    parallel: dict[tuple[int, str], list[ParallelSums]] = {}
    plausible = total = 0
    for start in range(0, len(order), batch_size):
        batch = [texts[index] for index in order[start : start + batch_size]]
        scores, by_depth, mask, num_plausible = _score_batch(target_model, draft_models, batch, scorer)
        for part, (acceptance, accepted) in zip(parts.values(), scores.flatten(0, 1), strict=True):
            part.append(sum_texts(TokenScores(acceptance, accepted), mask))
        for draft, deep in by_depth.items():
            for place, rule in enumerate(scorer.rules):
                parallel.setdefault((draft, rule), []).append(ParallelSums.of(deep[place, 0], deep[place, 1], mask))
        plausible += num_plausible
        total += int(mask.sum())
        on_texts(len(batch))
    back = sorted(range(len(order)), key=order.__getitem__)
    sums = [{name: joined(parts[draft, name], back) for name in scorer.names} for draft in drafts]
    depths = [
        {rule: joined(part, back) for (draft, rule), part in parallel.items() if draft == index}
        for index in range(len(draft_models))
    ]
    return PassResult(sums[: len(draft_models)], plausible / max(total, 1), sums[len(draft_models) :], depths)


@torch.inference_mode()
def proposed_tokens(
    draft_model: PreTrainedModel, text: Text, setting: DecodingSetting, target_model: PreTrainedModel, vocab_size: int
) -> list[int]:
    """The draft's likeliest token at each place of a completion, after the prompt and what the target wrote before.

    Arguments as in `score_texts`.
    """
    tokens = torch.tensor([[*text.prompt_ids, *text.completion_ids]], device=draft_model.device)
    start = len(text.prompt_ids)
    reader = _Reader(draft_model)
    reader.skip(tokens[:, : start - 1])
    logits = reader.read(tokens[:, start - 1 : -1])[0, :, :vocab_size].float()
    places = torch.arange(start, tokens.shape[1], device=draft_model.device)
    processors = logits_processors(setting, target_model)
    return process_logits(logits, tokens.expand(len(places), -1), places, processors).argmax(-1).tolist()


class _Scorer:
    """What to compute from the logits of each position: the same for every batch of a setting."""

    def __init__(
        self,
        target_model: PreTrainedModel,
        setting: DecodingSetting,
        verification: Sequence[str],
        vocab_size: int,
        draft_vocabularies: Sequence[tuple[int, Sequence[int]]],
    ) -> None:
        self.listed = [
            (draft, torch.tensor(list(ids), device=target_model.device)) for draft, ids in draft_vocabularies
        ]
        self.setting, self.vocab_size = setting, vocab_size
        self.rules = (EXACT,) if setting.is_greedy else tuple(verification)
        self.processors = logits_processors(setting, target_model)
        # llama.cpp's draft is given the temperature alone.
        temperature = DecodingSetting(setting.temperature)
        self.rule_processors = {"top_10_draft": logits_processors(temperature, target_model)}
        self.draft_processors: LogitsProcessorList | None = None
        if "rejection_sampling" in self.rules:
            self.draft_processors = transformers_draft_processors(setting, target_model)
        self.names = (*self.rules, *((AS_TRANSFORMERS,) if self.draft_processors is not None else ()))

    def score(
        self, logits: list[torch.Tensor], tokens: torch.Tensor, prefixes: torch.Tensor, prefix_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        """Acceptance and accepted of N positions, `[D, names, 2, N]`, and how many of their tokens are plausible.

        `logits` are those of the target, then of each draft, `[N, V]`; D counts each draft once more for each list.
        """
        target = process_logits(logits[0], prefixes, prefix_lengths, self.processors)
        written = target.gather(-1, tokens[:, None]).squeeze(-1)
        plausible = written == target.amax(-1) if self.setting.is_greedy else written > float("-inf")
        scores = []
        for raw in (*logits[1:], *(only_listed(logits[1 + draft], ids) for draft, ids in self.listed)):
            scores.append(self._by_rule(target, raw, tokens, prefixes, prefix_lengths))
            if self.draft_processors is not None:
                warped = process_logits(raw, prefixes, prefix_lengths, self.draft_processors)
                as_transformers = torch.stack(token_scores(warped, target, tokens, is_greedy=False))
                scores[-1] = torch.cat([scores[-1], as_transformers[None]])
        return torch.stack(scores), int(plausible.sum())

    def score_deeper(
        self,
        target: torch.Tensor,
        deeper: torch.Tensor,
        tokens: torch.Tensor,
        prefixes: torch.Tensor,
        prefix_lengths: torch.Tensor,
    ) -> torch.Tensor:
        """The same of a parallel draft at depth 2 to K, from its logits `[N, K − 1, V]`: `[rules, 2, N, K − 1]`."""
        target = process_logits(target, prefixes, prefix_lengths, self.processors)
        by_depth = [self._by_rule(target, raw, tokens, prefixes, prefix_lengths) for raw in deeper.unbind(1)]
        return torch.stack(by_depth, -1)

    def _by_rule(
        self,
        target: torch.Tensor,
        raw: torch.Tensor,
        tokens: torch.Tensor,
        prefixes: torch.Tensor,
        prefix_lengths: torch.Tensor,
    ) -> torch.Tensor:
        """`[rules, 2, N]` from a draft's logits and the processed ones of the target, `[N, V]`."""
        scores = []
        for rule in self.rules:
            draft = process_logits(raw, prefixes, prefix_lengths, self.rule_processors.get(rule, self.processors))
            found = token_scores(draft, target, tokens, is_greedy=self.setting.is_greedy, verification=rule)
            scores.append(torch.stack(found))
        return torch.stack(scores)


def _score_batch(
    target_model: PreTrainedModel, draft_models: Sequence[PreTrainedModel], texts: Sequence[Text], scorer: _Scorer
) -> tuple[torch.Tensor, dict[int, torch.Tensor], torch.Tensor, int]:
    """The scorer's scores, `[D, names, 2, B, T]` and 0 where a text has ended; those of parallel drafts by depth,
    `[rules, 2, B, T, K]`; which have not; plausible tokens.
    """
    device = target_model.device
    prompt_lengths, completion_lengths = (
        torch.tensor([len(part) for part in parts], device=device) for parts in zip(*texts, strict=True)
    )
    # Filled up on the right with an id that no completion token ever looks at.
    tokens = pad_sequence([torch.tensor([*prompt, *completion]) for prompt, completion in texts], True).to(device)
    places = torch.arange(tokens.shape[1], device=device)
    is_completion = (places >= prompt_lengths[:, None]) & (places < (prompt_lengths + completion_lengths)[:, None])
    mask = torch.arange(int(completion_lengths.max()), device=device) < completion_lengths[:, None]

    scores = torch.zeros(len(draft_models) + len(scorer.listed), len(scorer.names), 2, *mask.shape, device=device)
    parallel = {place: each for place, draft in enumerate(draft_models) if (each := parallel_draft(draft.config))}
    by_depth = {
        place: torch.zeros(len(scorer.rules), 2, *mask.shape, each.num_tokens, device=device)
        for place, each in parallel.items()
    }
    num_plausible = 0
    readers = [_Reader(model) for model in (target_model, *draft_models)]
    # The token at t is chosen by the logits at t - 1; nothing before the shortest prompt's last token is needed.
    start, stop = int(prompt_lengths.min()) - 1, tokens.shape[1] - 1
    for reader in readers:
        reader.skip(tokens[:, :start])
    depths = max((each.num_tokens for each in parallel.values()), default=1)
    at_once = _LOGITS_AT_ONCE if device.type == "cpu" else _LOGITS_AT_ONCE_ACCELERATOR
    per_slice = max(1, at_once // (tokens.shape[0] * scorer.vocab_size * depths))
    for begin in range(start, stop, per_slice):
        end = min(begin + per_slice, stop)
        rows, offsets = is_completion[:, begin + 1 : end + 1].nonzero(as_tuple=True)
        logits = []
        for reader, name in zip(readers, ["target", *["draft"] * len(draft_models)], strict=True):
            chosen = reader.read(tokens[:, begin:end])[rows.to(reader.device), offsets.to(reader.device)]
            logits.append(chosen[:, : scorer.vocab_size].to(device, torch.float32))
            if not (logits[-1] < float("inf")).all():
                raise FloatingPointError(
                    f"The {name}'s logits hold NaN or inf: its weights or its number format are broken."
                )
        positions = begin + 1 + offsets
        found, plausible = scorer.score(logits, tokens[rows, positions], tokens[rows], positions)
        scores[..., rows, positions - prompt_lengths[rows]] = found.float()
        num_plausible += plausible
        for place, each in parallel.items():
            deeper = deeper_logits(readers[place + 1], begin, end, start, each)[rows, offsets]
            deeper = deeper[..., : scorer.vocab_size].to(device, torch.float32)
            deeper = scorer.score_deeper(logits[0], deeper, tokens[rows, positions], tokens[rows], positions)
            all_depths = torch.cat([found[place, : len(scorer.rules), :, :, None], deeper], -1)
            by_depth[place][:, :, rows, positions - prompt_lengths[rows]] = all_depths.float()
    # A token the target could not have written has no defined a_t; `share_plausible` reports it.
    by_depth = {place: deeper.nan_to_num(0.0) for place, deeper in by_depth.items()}
    return scores.nan_to_num(0.0), by_depth, mask, num_plausible


class _Reader:
    """A model that reads on where it stopped, keeping its own cache: logits of one slice of positions at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        self.cache: Any = None
        self.length = self.batch_size = 0

    def read(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        self.length += tokens.shape[1]
        self.batch_size = len(tokens)
        # Texts are padded on the right, where no completion token looks: every position may be attended to.
        attention_mask = torch.ones((self.batch_size, self.length), dtype=torch.long, device=self.device)
        output = self.model(
            input_ids=tokens.to(self.device),
            attention_mask=attention_mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        self.cache = output.past_key_values
        return output.logits

    def skip(self, tokens: torch.Tensor) -> None:
        """Read without needing the logits."""
        if tokens.shape[1]:
            self.read(tokens, **({"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}))
