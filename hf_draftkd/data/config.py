"""What alignment data are made of: one config for `generate_alignment_data` and for `draftkd generate`."""

import os
from dataclasses import asdict, dataclass

from hf_draftkd.data.kept_distributions import CacheOptions
from hf_draftkd.decoding.setting import DecodingSetting, settings_at
from hf_draftkd.utils.checks import in_range, one_of, whole_number
from hf_draftkd.utils.fields import given_fields, option

SCENARIOS = ("queries", "curated", "synthetic")

# Fields that do something in one kind of run only: they are refused elsewhere, as they would silently do nothing.
_ONLY_WITH: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("dataset", None): ("dataset_config", "dataset_split", "max_prompts"),
    ("scenario", "queries"): ("prompt_column", "drop_last_answer", "skip_invalid"),
    ("scenario", "curated"): ("text_column", "question_column", "opening_tokens", "instruction"),
    ("scenario", "synthetic"): (
        *("num_prompts", "query_max_new_tokens", "query_temperature", "query_top_p", "system_prompt"),
        *("min_characters", "max_characters", "script"),
    ),
    ("endpoint", None): ("concurrency", "timeout", "max_retries", "send_ids", "skip_refused"),
    ("cache_distributions", None): ("cache_loss_temperature", "cache_dtype"),
}


@dataclass
class AlignmentDataConfig:
    """Configuration class for [`generate_alignment_data`]; every field is an option of `draftkd generate`.

    The help text of a field says what it does. In Python and YAML `cache_distributions` may also be a dict of the
    options of [`cache_target_distributions`]: `top_k` or `sampled`, `loss_temperature`, `dtype` and `seed`. What it
    leaves out is taken from the fields `cache_loss_temperature`, `cache_dtype` and `seed`. The paper of the Llama 2
    chat drafter (https://arxiv.org/abs/2403.00858) uses the temperatures 0, 0.3, 0.7 and 1.0 with `top_p` 0.95.

    Raises:
        ValueError: A value is out of range, or a field would do nothing in this kind of run.
    """

    output_dir: str | None = option(None, "Folder for the shards; the same command resumes a killed run in it.")
    scenario: str = option(
        "queries", "queries: answer prompts; curated: cut domain text into prompts; synthetic: the target asks."
    )

    # The prompts
    dataset: str | None = option(None, "Prompts or domain text: a Hub id, a file or a folder. Not for synthetic.")
    dataset_config: str | None = option(None, "Configuration (subset) of a Hub dataset.")
    dataset_split: str | None = option(None, "Split of the dataset; `train` where there are several.")
    max_prompts: int | None = option(None, "Take only this many rows of the dataset, from its start.")
    prompt_column: str = option("prompt", "queries: column with the prompts, strings or lists of messages.")
    drop_last_answer: bool = option(False, "queries: drop a conversation's last answer; the target answers instead.")
    skip_invalid: bool = option(False, "queries: leave out empty and malformed prompts instead of refusing them.")
    text_column: str = option("text", "curated: column with documents.")
    question_column: str | None = option(None, "curated: column with questions; documents are then not cut.")
    opening_tokens: int = option(64, "curated: tokens of a document's opening.")
    instruction: str | None = option(None, "curated: a user's message around the opening, with {text} where it goes.")
    num_prompts: int = option(1000, "synthetic: queries to keep.")
    query_max_new_tokens: int = option(128, "synthetic: longest query, in tokens.")
    query_temperature: float = option(1.0, "synthetic: sampling temperature of the queries.")
    query_top_p: float = option(0.99, "synthetic: nucleus sampling of the queries.")
    system_prompt: str | None = option(None, "synthetic: a system message in front, to name the domain.")
    min_characters: int | None = option(None, "synthetic: shortest query to keep.")
    max_characters: int | None = option(None, "synthetic: longest query to keep.")
    script: str | None = option(None, "synthetic: Unicode script that a query must be written in, such as latin.")
    skip_too_long: bool = option(False, "Leave out prompts that do not fit into the context instead of refusing them.")

    # The answers
    max_new_tokens: int = option(256, "Longest completion, in tokens.")
    temperatures: list[float] = option([0.0], "One completion per prompt for each; 0 is greedy.")
    top_p: float = option(1.0, "Nucleus sampling at temperatures above 0.")
    top_k: int = option(0, "Top-k sampling at temperatures above 0; 0 keeps every token.")
    repetition_penalty: float | None = option(
        None, "As in transformers, 1 for none; by default that of the target's generation config, with an endpoint 1."
    )
    stop_at_turn_end: bool = option(
        False, "End answers at the chat template's end of turn too, where the target's generation config lacks it."
    )
    num_completions: int = option(1, "Completions per prompt at each temperature above 0.")
    seed: int = option(0, "Seed of the whole data set.")
    batch_size: int = option(8, "Prompts decoded together. Sampled completions depend on it.")
    shard_size: int | None = option(None, "Prompts per shard; by default a sixteenth of them, 4 batches to 256.")
    context_length: int | None = option(
        None, "Longest text the target takes, prompt and completion, in tokens; by default what its config says."
    )
    draft_model: str | None = option(
        None, "A draft that helps the target to write: greedy rows are the same, sampled ones equally distributed."
    )
    continuous_batching: bool = option(
        False, "transformers' continuous batching: exact ids, but sampled rows cannot be repeated."
    )
    cache_distributions: dict | str | None = option(
        None, "Keep the distributions that the target's tokens were chosen from: top_k=64 or sampled=50."
    )
    cache_loss_temperature: float = option(1.0, "Loss temperature of the kept distributions; train at the same one.")
    cache_dtype: str = option("float16", "Type of the kept log-probabilities: float16 or float32.")

    # A target behind a server
    endpoint: str | None = option(None, "An OpenAI-compatible server that runs the target. Key: OPENAI_API_KEY.")
    concurrency: int = option(16, "endpoint: requests in flight.")
    timeout: float = option(600.0, "endpoint: seconds to wait for one answer.")
    max_retries: int = option(8, "endpoint: further attempts after 429, 5xx, a time-out or a lost connection.")
    send_ids: bool = option(False, "endpoint: send token ids instead of text.")
    skip_refused: bool = option(False, "endpoint: leave out prompts that the server refuses instead of stopping.")

    def __post_init__(self) -> None:
        """Check every value that can be checked without the target."""
        if self.output_dir is not None:
            self.output_dir = os.path.expanduser(self.output_dir)
        if isinstance(self.temperatures, int | float):
            self.temperatures = [self.temperatures]
        one_of("scenario", self.scenario, SCENARIOS)
        for name in (
            *("max_new_tokens", "num_completions", "batch_size", "concurrency", "opening_tokens", "num_prompts"),
            "query_max_new_tokens",
        ):
            whole_number(name, getattr(self, name))
        for name in ("max_prompts", "shard_size", "context_length", "min_characters", "max_characters"):
            if (value := getattr(self, name)) is not None:
                whole_number(name, value)
        whole_number("max_retries", self.max_retries, 0)
        in_range("timeout", self.timeout, 0, open_low=True)
        self.requests  # noqa: B018 - raises where a setting is out of range
        self._refuse_what_would_do_nothing()
        if self.scenario == "synthetic" and self.dataset is not None:
            raise ValueError("The scenario `synthetic` takes no `dataset`: the target writes the queries itself.")
        if self.stop_at_turn_end and self.endpoint is not None:
            raise ValueError(
                "`stop_at_turn_end` needs a target on this machine: a server stops where its own generation config "
                "says. vLLM takes further end tokens in each request: "
                '`endpoint_options={"extra_body": {"stop_token_ids": [...]}}`.'
            )
        if self.continuous_batching and self.endpoint is not None:
            raise ValueError(
                "`continuous_batching` would do nothing beside `endpoint`: a server batches in its own way. Leave one "
                "of them out."
            )
        if self.continuous_batching and self.repetition_penalty not in (None, 1):
            raise ValueError(
                f"Continuous batching applies no repetition penalty, got {self.repetition_penalty} (the target's own, "
                "if none was given). Give `repetition_penalty=1`, or leave out `continuous_batching`."
            )
        if self.draft_model is not None:
            self.refuse_beside_draft()
        cache = self.cache
        if self.endpoint is not None and cache is not None and (cache.top_k is None or cache.loss_temperature != 1):
            raise ValueError(
                "A server returns its likeliest tokens, at temperature 1, and nothing else: give `top_k` alone, got "
                f"{self.cache_distributions!r}. OpenAI's servers return 5 at most, vLLM 20 unless started with more."
            )

    @property
    def requests(self) -> dict[DecodingSetting, int]:
        """Each decoding setting, and how many completions of a prompt are asked for under it."""
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        settings = settings_at(self.temperatures, top_p=self.top_p, top_k=self.top_k, repetition_penalty=penalty)
        return {setting: 1 if setting.is_greedy else self.num_completions for setting in settings}

    @property
    def cache(self) -> CacheOptions | None:
        """What to keep of the target's distributions."""
        given = self.cache_distributions
        if given is None:
            return None
        if isinstance(given, str):
            name, _, number = given.partition("=")
            if name not in ("top_k", "sampled") or not number.isdigit():
                raise ValueError(f"`cache_distributions` is written as top_k=64 or sampled=50, got {given!r}.")
            given = {name: int(number)}
        for name in given:
            one_of("option of `cache_distributions`", name, asdict(CacheOptions()))
        beside = {"loss_temperature": self.cache_loss_temperature, "dtype": self.cache_dtype, "seed": self.seed}
        return CacheOptions(**{**beside, **given})

    def refuse_beside_prompts(self) -> None:
        """Refuse what says where prompts come from, for a caller who brings them."""
        for each in given_fields(
            self, ("dataset", *_ONLY_WITH["scenario", "curated"], *_ONLY_WITH["scenario", "synthetic"])
        ):
            raise ValueError(f"`{each}` would do nothing beside `prompts`. Leave out one of them.")

    def refuse_beside_draft(self) -> None:
        """Refuse ways of answering in which no draft can help."""
        for each in given_fields(self, ("endpoint", "continuous_batching")):
            raise ValueError(
                f"`draft_model` helps a local target that decodes in plain batches, which `{each}` does not do. Leave "
                "out one of them."
            )

    def _refuse_what_would_do_nothing(self) -> None:
        """A system prompt that no query is written under, or a time-out without a server."""
        for (name, wanted), idle in _ONLY_WITH.items():
            value = getattr(self, name)
            if value is not None if wanted is None else value == wanted:
                continue
            for each in given_fields(self, idle):
                condition = name if wanted is None else f"{name} {wanted}"
                raise ValueError(f"`{each}` would do nothing without `{condition}`. Leave it out, or add that.")
        if all(setting.is_greedy for setting in self.requests):
            for each in given_fields(self, ("top_p", "top_k", "num_completions")):
                raise ValueError(
                    f"`{each}` would do nothing at temperature 0. Leave it out, or give a temperature above 0."
                )
