"""Whether texts are what they claim to be, and what a reader of the figures must be told about them."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from hf_draftkd.evaluation.texts import TextSet
from hf_draftkd.models.context import context_length
from hf_draftkd.models.identity import model_revision

# Below this share of tokens that the target could have written, a text was written by something else: rounding in
# low precision moves a few in a hundred at most.
PLAUSIBLE = 0.95


def own_penalty(target_model: PreTrainedModel) -> float:
    """The repetition penalty of a model's generation config, 1 where it has none."""
    return target_model.generation_config.repetition_penalty or 1.0


def check_ids(texts: TextSet, vocab_size: int) -> None:
    """Refuse texts with ids outside the pair's shared vocabulary.

    Raises:
        ValueError: Such an id is found.
    """
    for number, text in enumerate(texts.texts):
        if max(max(text.prompt_ids), max(text.completion_ids)) >= vocab_size:
            raise ValueError(
                f"Text {number} holds token ids from {vocab_size} on, which the pair's shared vocabulary does not "
                "have. Was it written by another target?"
            )


def check_lengths(model: PreTrainedModel, text_sets: Sequence[TextSet]) -> None:
    """Refuse texts longer than a model can read.

    Raises:
        ValueError: Such a text is found.
    """
    context = context_length(model)
    longest = max(sum(map(len, text)) for texts in text_sets for text in texts.texts)
    if context is not None and longest > context:
        raise ValueError(
            f"The longest text has {longest} tokens, but {model.name_or_path or type(model).__name__!r} reads at most "
            f"{context}. Leave such texts out."
        )


def shared_context(*models: PreTrainedModel) -> int:
    """The longest text that every one of the models can read; without a limit, more than any text has."""
    lengths = [context_length(model) for model in models]
    return min((length for length in lengths if length is not None), default=sys.maxsize)


def by_this_target(target_model: PreTrainedModel, text_sets: Sequence[TextSet]) -> tuple[list[TextSet], list[str]]:
    """Texts of another author give acceptance rates alone: what they say of block efficiency is nothing.

    Returns:
        The text sets, those of which a row names another target, or another commit of this one, no longer exact; and
        what to say about them.
    """
    own, commit = target_model.name_or_path, model_revision(target_model)

    def is_other(author: tuple[str, str | None]) -> bool:
        return author[0] != own or (None not in (author[1], commit) and author[1] != commit)

    others = sorted(
        _at(*author) for author in frozenset().union(*(texts.written_by for texts in text_sets)) if is_other(author)
    )
    if not others:
        return list(text_sets), []
    judged = [
        replace(texts, is_exact=texts.is_exact and not any(map(is_other, texts.written_by))) for texts in text_sets
    ]
    return judged, [
        f"The texts were written by {', '.join(others)}, the target here is {_at(own, commit)}: acceptance rates are "
        "given, block efficiencies are not. If it is the same model under another name, put that name into the column "
        "`target`."
    ]


def _at(name: str, commit: str | None) -> str:
    return name if commit is None else f"{name} at {commit}"


def plausibility_warnings(target_model: PreTrainedModel, texts: TextSet, share: float) -> list[str]:
    """Tokens that the target would not have written under the setting they are recorded with.

    Args:
        target_model: The target.
        texts: The texts; those that claim nothing are not judged.
        share: Of their tokens, those that the target could have written.
    """
    if not texts.is_exact or share == 1:
        return []
    if share < PLAUSIBLE:
        return [
            f"Only {share:.1%} of the tokens recorded under {texts.setting} could have been written by this target so: "
            "they come from another model or setting. Acceptance rates are given, block efficiencies are not."
        ]
    return [
        f"{1 - share:.2%} of the tokens written under {texts.setting} are not what one forward pass of the target "
        f"gives: near-ties that rounding in {target_model.dtype} decides."
    ]


def inherited_setting_warnings(target_model: PreTrainedModel, text_sets: Sequence[TextSet]) -> list[str]:
    """Which entries of the target's generation config were applied, and which were not."""
    own, penalty = target_model.generation_config, own_penalty(target_model)
    found = []
    if penalty != 1:
        applied = {texts.setting.repetition_penalty for texts in text_sets}
        how = "applied to draft and target alike" if applied == {penalty} else "not applied, as the settings say"
        found.append(f"The target's generation config carries repetition_penalty {penalty:g}: {how}.")
    used = {(texts.setting.top_p, texts.setting.top_k) for texts in text_sets if not texts.setting.is_greedy}
    carried = [
        f"{name} {value:g}"
        for name, value, neutral in (("top_p", own.top_p, 1), ("top_k", own.top_k, 0), ("min_p", own.min_p, 0))
        if value is not None and value != neutral
    ]
    if carried and used and used != {(own.top_p or 1.0, own.top_k or 0)}:
        found.append(
            f"The target's generation config carries {', '.join(carried)}, which the settings measured here replace."
        )
    return found


def suppressed_token_warnings(
    draft_models: Sequence[PreTrainedModel], target_model: PreTrainedModel, vocab_size: int
) -> list[str]:
    """Drafts that `generate` keeps from proposing some tokens: the figures computed here know nothing of that."""
    targets = set(target_model.generation_config.suppress_tokens or ())
    found = []
    for draft in draft_models:
        own = {token for token in draft.generation_config.suppress_tokens or () if token < vocab_size} - targets
        if own:
            found.append(
                f"The generation config of {draft.name_or_path or 'the draft'} suppresses {len(own)} "
                f"token{'s' if len(own) > 1 else ''} of the vocabulary ({min(own)}{', ...' if len(own) > 1 else ''}), "
                "which transformers then never drafts: computed figures are those of a draft that may propose them."
            )
    return found
