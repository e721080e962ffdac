"""Exact acceptance from one forward pass of each model over text the target wrote: no decoding, no sampling noise.

Two halves. `token_scores` and `sum_texts` are pure functions on tensors, which the trainer's evaluation calls too.
`score_texts` runs the models: several drafts beside one target, in batches, a slice of positions at a time, so that
memory grows neither with vocabulary times text length nor with the number of texts.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, PreTrainedModel

from hf_draftkd.acceptance import DRAFT_LENGTHS, accepted_given_output, expected_target_calls, token_acceptance_rate
from hf_draftkd.acceptance.tensors import only_listed
from hf_draftkd.data.parallel import attention_mask_for
from hf_draftkd.decoding.processors import logits_processors, process_logits, transformers_draft_processors
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.models.forward import CACHE
from hf_draftkd.models.parallel import ParallelDraft, parallel_draft

EXACT = "exact_match"  # how greedy text is verified, whatever the engine
AS_TRANSFORMERS = "as_transformers"


def in_one_pass(rule: str) -> str:
    """The name of a parallel draft's sums under a verification rule, where one pass drafts all tokens of a block."""
    return f"{rule}_in_one_pass"


def lengths_of(num_tokens: int) -> tuple[int, ...]:
    """The draft lengths that are reported of a parallel draft of K tokens."""
    return tuple(length for length in DRAFT_LENGTHS if length <= num_tokens)


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
        acceptance: `[N]`, float64: α summed over tokens; of a parallel draft `[N, K]`, at each depth over those that
            can be drafted there.
        target_calls: `[N, 16]`, float64: expected target calls for γ = 1…16, of a parallel draft for γ = 1…min(K, 16).
        accepted: a_t of every token, one float64 tensor per text.
    """

    num_tokens: torch.Tensor
    acceptance: torch.Tensor
    target_calls: torch.Tensor
    accepted: list[torch.Tensor]

    @classmethod
    def joined(cls, parts: Sequence["TextSums"], order: Sequence[int]) -> "TextSums":
        """Sums of several batches as one, its texts in the order named."""
        accepted = [of_text for part in parts for of_text in part.accepted]
        return cls(
            num_tokens=torch.cat([part.num_tokens for part in parts])[order],
            acceptance=torch.cat([part.acceptance for part in parts])[order],
            target_calls=torch.cat([part.target_calls for part in parts])[order],
            accepted=[accepted[text] for text in order],
        )


@dataclass(frozen=True)
class PassResult:
    """What one pass over the texts of one setting says.

    Attributes:
        drafts: For each draft that is scored over its whole head, in the order given: verification rule → sums.
            `as_transformers` stands beside the rules where transformers' `generate` warps the draft's distribution
            differently (`transformers_draft_processors`), and `in_one_pass` of each rule for a parallel draft.
        share_plausible: Share of the tokens that this target could have written under the setting: its likeliest one
            when greedy, any with a chance above 0 when sampling.
        listed: The same as `drafts`, for each of the `draft_vocabularies` asked for.
    """

    drafts: list[dict[str, TextSums]]
    share_plausible: float
    listed: list[dict[str, TextSums]]


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
    """Add up scores `[B, T]`, or `[B, T, K]` by depth, over the tokens of each text, where `mask` `[B, T]` is true: one
    run from the left.

    Raises:
        ValueError: The mask has gaps, or scores are no probabilities.
    """
    counted = mask = mask.bool().cpu()
    acceptance, accepted = scores.acceptance.cpu().double(), scores.accepted.cpu().double()
    lengths = DRAFT_LENGTHS
    if accepted.ndim == 3:
        depths = torch.arange(accepted.shape[2])
        # The first token of a text cannot be the second of a block.
        counted = mask[..., None] & (depths <= torch.arange(mask.shape[1])[:, None])
        lengths = lengths_of(len(depths))
    return TextSums(
        num_tokens=mask.sum(1).double(),
        acceptance=(acceptance * counted).sum(1),
        target_calls=expected_target_calls(accepted, lengths, mask),
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
    listed_only: bool = False,
    parallel: bool = True,
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
        listed_only: Leave out the whole heads of the drafts that `draft_vocabularies` names.
        parallel: Score parallel drafts in one pass too; False: as ordinary drafts alone.
        batch_size: Texts per forward pass.
        on_texts: Called with the number of texts done, after every batch.

    Raises:
        FloatingPointError: A model returned NaN or inf.
    """
    order = sorted(range(len(texts)), key=lambda index: sum(map(len, texts[index])))
    with_list = {draft for draft, _ in draft_vocabularies} if listed_only else set()
    whole = [(draft, None) for draft in range(len(draft_models)) if draft not in with_list]
    scorer = _Scorer(target_model, setting, verification, vocab_size, [*whole, *draft_vocabularies], parallel)
    parts: dict[int, dict[str, list[TextSums]]] = defaultdict(lambda: defaultdict(list))
    plausible = total = 0
    for start in range(0, len(order), batch_size):
        batch = [texts[index] for index in order[start : start + batch_size]]
        scores, mask, num_plausible = _score_batch(target_model, draft_models, batch, scorer)
        for (draft, name), (acceptance, accepted) in scores.items():
            parts[draft][name].append(sum_texts(TokenScores(acceptance, accepted), mask))
        plausible += num_plausible
        total += int(mask.sum())
        on_texts(len(batch))
    back = sorted(range(len(order)), key=order.__getitem__)
    sums = [{name: TextSums.joined(found, back) for name, found in parts[draft].items()} for draft in sorted(parts)]
    return PassResult(sums[: len(whole)], plausible / max(total, 1), sums[len(whole) :])


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


class _Positions(NamedTuple):
    """N positions of written texts."""

    tokens: torch.Tensor
    """`[N]`: the token that was written there."""
    texts: torch.Tensor
    """`[N, L]`: the text it belongs to."""
    places: torch.Tensor
    """`[N]`: where in that text."""


class _Scorer:
    """What to compute from the logits of each position: the same for every batch of a setting."""

    def __init__(
        self,
        target_model: PreTrainedModel,
        setting: DecodingSetting,
        verification: Sequence[str],
        vocab_size: int,
        heads: Sequence[tuple[int, Sequence[int] | None]],
        parallel: bool,
    ) -> None:
        self.heads = [
            (draft, ids if ids is None else torch.tensor(list(ids), device=target_model.device)) for draft, ids in heads
        ]
        self.setting, self.vocab_size, self.parallel = setting, vocab_size, parallel
        self.rules = (EXACT,) if setting.is_greedy else tuple(verification)
        self.processors = logits_processors(setting, target_model)
        # llama.cpp's draft is given the temperature alone.
        temperature = DecodingSetting(setting.temperature)
        self.rule_processors = {"top_10_draft": logits_processors(temperature, target_model)}
        self.draft_processors: LogitsProcessorList | None = None
        if "rejection_sampling" in self.rules:
            self.draft_processors = transformers_draft_processors(setting, target_model)

    def score(
        self, target: torch.Tensor, drafts: Sequence[torch.Tensor], deeper: dict[int, torch.Tensor], at: _Positions
    ) -> tuple[dict[tuple[int, str], torch.Tensor], int]:
        """Acceptance and accepted of N positions, and how many of their tokens are plausible.

        Args:
            target: Its logits `[N, V]`.
            drafts: Logits `[N, V]` of each.
            deeper: For each parallel draft its logits at depth 2 to K, `[N, K − 1, V]`.
            at: The positions.

        Returns:
            `[2, N]`, in one pass `[2, N, K]`, by place in `heads` and name.
        """
        p = process_logits(target, at.texts, at.places, self.processors)
        written = p.gather(-1, at.tokens[:, None]).squeeze(-1)
        plausible = written == p.amax(-1) if self.setting.is_greedy else written > float("-inf")
        found: dict[tuple[int, str], torch.Tensor] = {}
        for number, (draft, ids) in enumerate(self.heads):
            for rule, scores in self._by_rule(p, only_listed(drafts[draft], ids), at).items():
                found[number, rule] = scores
            if ids is None and self.draft_processors is not None:  # transformers' own loop knows no list
                q = process_logits(drafts[draft], at.texts, at.places, self.draft_processors)
                found[number, AS_TRANSFORMERS] = torch.stack(token_scores(q, p, at.tokens, is_greedy=False))
            if draft in deeper:
                depths = [self._by_rule(p, only_listed(raw, ids), at) for raw in deeper[draft].unbind(1)]
                for rule in self.rules:
                    by_depth = [found[number, rule], *(of[rule] for of in depths)]
                    found[number, in_one_pass(rule)] = torch.stack(by_depth, -1)
        return found, int(plausible.sum())

    def _by_rule(self, p: torch.Tensor, raw: torch.Tensor, at: _Positions) -> dict[str, torch.Tensor]:
        """`[2, N]` by rule, from a draft's logits and the processed ones of the target, `[N, V]`."""
        found = {}
        for rule in self.rules:
            q = process_logits(raw, at.texts, at.places, self.rule_processors.get(rule, self.processors))
            scores = token_scores(q, p, at.tokens, is_greedy=self.setting.is_greedy, verification=rule)
            found[rule] = torch.stack(scores)
        return found


def _score_batch(
    target_model: PreTrainedModel, draft_models: Sequence[PreTrainedModel], texts: Sequence[Text], scorer: _Scorer
) -> tuple[dict[tuple[int, str], torch.Tensor], torch.Tensor, int]:
    """Run every model over one batch of texts, a slice of positions at a time.

    Returns:
        Scores `[2, B, T]` or `[2, B, T, K]` by head and name, as `_Scorer.score` gives them and 0 behind the end of a
        text; the mask `[B, T]` of the texts' tokens; and the number of plausible tokens.
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

    scores: dict[tuple[int, str], torch.Tensor] = {}
    num_plausible = 0
    readers = [_Reader(model) for model in (target_model, *draft_models)]
    parallel = {
        place: each
        for place, draft in enumerate(draft_models)
        if scorer.parallel and (each := parallel_draft(draft.config))
    }
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
        deeper = {
            place: readers[place + 1]
            .deeper(begin, end, start, each)[rows, offsets, :, : scorer.vocab_size]
            .to(device, torch.float32)
            for place, each in parallel.items()
        }
        positions = begin + 1 + offsets
        at = _Positions(tokens[rows, positions], tokens[rows], positions)
        found, plausible = scorer.score(logits[0], logits[1:], deeper, at)
        for key, of in found.items():
            if key not in scores:
                scores[key] = torch.zeros(2, *mask.shape, *of.shape[2:], device=device)
            scores[key][:, rows, positions - prompt_lengths[rows]] = of.float()
        num_plausible += plausible
    # A token the target could not have written has no defined a_t; `share_plausible` reports it.
    return {key: of.nan_to_num(0.0) for key, of in scores.items()}, mask, num_plausible


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
            **{CACHE: self.cache},
            use_cache=True,
            return_dict=True,
            **options,
        )
        self.cache = getattr(output, CACHE)
        return output.logits

    def skip(self, tokens: torch.Tensor) -> None:
        """Read without needing the logits."""
        if tokens.shape[1]:
            self.read(tokens, **({"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}))

    def deeper(self, begin: int, end: int, first: int, draft: ParallelDraft) -> torch.Tensor:
        """What a parallel draft says at depth 2 to K of the tokens behind positions `begin` to `end`, just read.

        From every position at once: behind the cached text come the blocks of mask tokens of all positions, each of
        which sees the text up to its own position and itself.

        Returns:
            `[B, end − begin, K − 1, V]`; meaningless where a block would begin before `first`, the first position that
            is ever drafted from.
        """
        steps = draft.num_tokens - 1
        bases = torch.arange(max(first, begin - steps), end, device=self.device)
        base, step = bases.repeat_interleave(steps), torch.arange(1, steps + 1, device=self.device).repeat(len(bases))
        sees_text = torch.arange(end, device=self.device) <= base[:, None]
        sees_block = (base == base[:, None]) & (step <= step[:, None])
        sees = torch.cat([sees_text, sees_block], 1).expand(self.batch_size, 1, -1, -1)
        self.cache.activate_past_recording()  # or the mask tokens could not be taken out of a sliding window
        logits = self.model(
            input_ids=torch.full((self.batch_size, len(base)), draft.mask_token_id, device=self.device),
            # What would stand behind the tokens just read is not looked at; learned positions may end there.
            position_ids=(base + step).clamp(max=end - 1).expand(self.batch_size, -1),
            attention_mask=attention_mask_for(self.model, sees),
            **{CACHE: self.cache},
            use_cache=True,
            return_dict=True,
        ).logits.unflatten(1, (len(bases), steps))
        self.cache.crop(-len(base))
        # The block of base t says at its j-th mask token what comes after position t + j. So what is said behind a
        # position at depth j + 1 stands in the block that began j before it.
        positions = torch.arange(begin, end, device=self.device)[:, None]
        jumps = torch.arange(steps, device=self.device)
        places = (positions - jumps - 1 - bases[0]).clamp(min=0)
        return logits[:, places, jumps]
