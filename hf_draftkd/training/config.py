"""What a distillation run is made of: `SFTConfig` plus the few values that distilling adds."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from transformers import SchedulerType
from trl import SFTConfig

from hf_draftkd.acceptance import DRAFT_LENGTHS
from hf_draftkd.data.mixing import parse_mix
from hf_draftkd.data.shards import launched_on_cpus
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.losses import DIVERGENCES, get_divergence, reads_target
from hf_draftkd.training.token_selection import TOKEN_SELECTIONS
from hf_draftkd.utils.checks import in_range, one_of, whole_number
from hf_draftkd.utils.fields import given_fields, option

# Inherited options that would silently do nothing here, or harm, each with what to use instead, or why. A value other
# than the default is refused by name.
_REFUSED: dict[str, tuple[Any, str]] = {
    "loss_type": ("nll", "Choose the loss with `divergence`."),
    "label_smoothing_factor": (0.0, "The target's own distribution already smooths the labels."),
    "router_aux_loss_coef": (None, "The draft's load-balancing loss is not part of distillation."),
    "use_liger_kernel": (False, "Liger replaces the forward pass that the distillation loss reads its logits from."),
    "batch_eval_metrics": (False, "Metrics are summed over all texts before dividing; see `trainer.evaluate()`."),
    "hub_strategy": ("end", "A draft is published whole and measured: call `trainer.push_to_hub()` after training."),
    "truncation_mode": ("keep_start", "A completion without its prompt is not what the target was asked."),
    "include_for_metrics": ([], "Read the metrics from `trainer.evaluate()`."),
    "bf16_full_eval": (False, "It would leave the draft itself in bfloat16, to be trained and saved so."),
    "fp16_full_eval": (False, "It would leave the draft itself in float16, to be trained and saved so."),
}
# What only one value of another option reads.
_OPTIONS_OF_LOSSES = {
    "beta": ("divergence", "generalized_jsd"),
    "eta": ("divergence", "lk_hybrid"),
    "tvd_estimator": ("divergence", "tvd_plus_plus"),
    "tvd_statistics": ("divergence", "tvd_plus_plus"),
    "selected_share": ("token_selection", "adaspec"),
}
_OPTIONS_OF_WRITING = ("max_new_tokens", "generation_temperature", "generation_top_p", "generation_top_k")


def plain_options(args: "DraftDistillConfig", names: Iterable[str]) -> dict[str, Any]:
    """Options by name, as JSON has them. (`to_dict` writes into the dictionaries among them.)"""
    values = {name: getattr(args, name) for name in names}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def bf16_is_usable() -> bool:
    """Whether an accelerator computes in bf16. Not a CPU: transformers takes it there only with `use_cpu`."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return hasattr(torch, "xpu") and torch.xpu.is_available()


@dataclass
class DraftDistillConfig(SFTConfig):
    r"""Configuration class for the [`DraftDistillTrainer`].

    Every parameter of [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`] works as there, except those listed
    at the end.

    The help text of a field says what it does; what takes more words stands here. The guide
    `examples/guides/choosing.md` says what most of the values cost and bring in an ablation.

    Parameters:
        > The models and the loss

        target_model_init_kwargs (`dict[str, Any]`):
            For [`load_target`], when the target is given as an id. `dtype` defaults to `"auto"`: it is only read.
            `gguf_file` names the file of a target that exists only as GGUF.
        shard_target (`bool`):
            `False` keeps the target whole on each process under FSDP: faster where it fits, and its logits are then
            computed a chunk of positions at a time. ZeRO-3 always shards it.
        divergence (`str`):
            `cross_entropy` on the completion's own tokens is black box: it needs no target.
        tvd_estimator (`str`):
            `"sampled"` draws from the draft, as the paper does; `"full"` takes the expectation over the vocabulary.
        cross_entropy_weight (`float`):
            w in (1 - w) * divergence + w * cross-entropy.
        draft_vocabulary (`list[int]` or `str`):
            Ids that the draft may propose, as [`choose_draft_vocabulary`] finds them, or `"recorded"`: those that the
            draft's generation config holds. The draft's distribution is masked to them and renormalised, the target's
            is not; what the loss cannot change is left out (forward KL sums over the list, and text outside it adds no
            cross-entropy). All metrics are those of such a draft. From cached distributions, or from text alone, only
            the list's logits are computed, so that a step costs less. The list is saved in its generation config, where
            [`SpeculativeDecoding`] reads it; other decoding uses the whole head, whose other rows learn nothing.
        parallel_tokens (`int`):
            K: tokens that the draft learns to predict in one pass, from mask tokens (PARD, arXiv 2504.18583), so that
            [`SpeculativeDecoding`], and vLLM with `"parallel_drafting": true`, draft with one pass a round. 1 is an
            ordinary draft. A row teaches its tokens at every depth in one forward pass, deeper ones at fewer positions
            (0.7 per depth, at least 0.2), so a step with K = 8 costs about three times an ordinary one; the target
            runs once, as ever. The mask token, an id that no text holds, and K are recorded in the draft's config.
            Distil first, and set it then: depth 1 stays what an ordinary draft learns, and `assistant_model=` uses it.
            Metrics of `evaluate()` are those of depth 1; [`evaluate_draft`] reports both ways of drafting. Attention
            is "sdpa" or "eager", with a mask that grows with the square of the row.
        parallel_weights (`str`):
            `"uniform"`: each token counts alike at each depth. `"confidence"`: by the target's probability of the
            tokens before it in its block (PARD-2), without which it is never verified.

        > The data, and who writes the completions

        mix (`str`):
            `"9:1"` where a `mix_dataset` is given: nine rows of alignment data to one of pretraining text, as for the
            Llama 2 chat drafter (arXiv 2403.00858).
        lmbda (`float`):
            As in [`~trl.experimental.gkd.GKDConfig`]: 0 learns from the data as it is, 1 is fully on-policy. The guide
            `examples/guides/papers.md` has the settings of the papers' methods.
        seq_kd (`bool`):
            The target writes again in each epoch. Text that it wrote once and kept ([`generate_alignment_data`]) costs
            its seconds once.
        skd_top_k (`int`):
            How strictly the target corrects the draft while it writes (SKD, arXiv 2410.11325, with 25).
        generation_temperature, generation_top_p, generation_top_k:
            The sampling settings in the models' own generation configs are not used.

        > Which tokens are learned from

        token_selection (`str`):
            - `"all"` completion tokens alike.
            - `"adaspec"` (arXiv 2510.19779): the `selected_share` of tokens where the draft's loss exceeds that of the
              trainer's `reference_model` most, a copy of the draft that was distilled before. Chosen again in each
              batch, as in the paper: so here, unlike elsewhere, batch size × accumulation steps changes the result.
              With `divergence="cross_entropy"` it needs no target.
            - `"after_first_rejection"`: each token by how likely speculative decoding, started with the completion,
              has met a rejection by then: 1 − Π α over the completion's tokens up to this one, with the acceptance
              rate α at the loss temperature. It is the same on any text, padded or packed.
            - `"after_first_mismatch"`: from the first token on that the draft does not find likeliest. On text that
              the target wrote greedily these are exactly the tokens from the first rejection on. Needs no target.

            Losses are divided by the number of all completion tokens, selected or not (as AdaSPEC's own code does),
            and metrics of `evaluate()` are of all of them. For custom weights override
            [`DraftDistillTrainer.token_weights`].

        > Evaluation

        metric_for_best_model (`str`):
            Any metric of `evaluate()`, such as `eval_block_efficiency`; with several evaluation sets by name,
            `eval_{name}_block_efficiency`. `load_best_model_at_end` chooses by `loss` where nothing is said, and with
            `divergence="tvd_plus_plus"`, whose value means nothing, by `eval_acceptance_rate`. A metric that the data
            cannot give is refused.

    > [!NOTE]
    > Defaults that differ from [`~trl.SFTConfig`]:
    > - `activation_checkpointing` (`gradient_checkpointing`): `False`. A draft is small; recomputing its activations
    >   costs more than it saves.
    > - `learning_rate`: `3e-4`, DistillSpec's (arXiv 2310.08461). A draft is 10 to 100 times smaller than the models
    >   the inherited 2e-5 is meant for. Smaller ones take more: the ablation's, of 0.7 M parameters, is best at 3e-3.
    > - `max_length`: `2048`. A row is a prompt and an answer; 1024 would cut ordinary chat answers.
    > - `bf16`: stays off where no accelerator computes in bf16, so that no argument is needed on a CPU.
    > - `use_cpu`: `True` in each of several processes without an accelerator, which would not know of each other.
    > - `dataloader_pin_memory`: off without an accelerator, where it only makes torch warn.
    > - `eval_strategy`: `"no"` becomes `"epoch"` where an `eval_dataset` is given, which would otherwise lie unused.
    > - `hub_strategy`: `"end"`. Half-trained drafts and adapters are not what somebody else can load.
    > - `accelerator_config["dispatch_batches"]`: `False`, for evaluation data too. Each process reads a stream itself.
    > - `ddp_find_unused_parameters`: `False`. Every parameter of a causal LM is used in every step.
    > - `use_cache`: `True`. It is saved in the draft's config, and a draft without a cache is slow; training passes
    >   never make one.
    > - `lr_scheduler_kwargs["mode"]`: `"max"` where a scheduler follows a metric of which more is better.
    > - `logging_nan_inf_filter`: `False`. A loss that is not finite stops the run instead of being hidden.
    >
    > Refused, since they would do nothing here: `loss_type`, `label_smoothing_factor`, `router_aux_loss_coef`,
    > `use_liger_kernel`, `batch_eval_metrics`, `include_for_metrics`, `truncation_mode="keep_end"`. Refused as
    > well: a `chat_template_path` that is not a `.jinja` file, since it would give the draft another vocabulary, and
    > `bf16_full_eval` and `fp16_full_eval`, since transformers then converts the draft itself.

    Raises:
        ValueError: A value is out of range or of an unknown name, or a refused option is set.
    """

    gradient_checkpointing: bool | None = option(
        None, "Older name of `activation_checkpointing`. Off by default: a draft is small."
    )
    learning_rate: float = option(3e-4, "The initial learning rate for AdamW.")
    max_length: int | None = option(
        2048, "Longest prompt and completion together, in tokens; longer rows are cut at the end."
    )
    use_cache: bool = option(True, "Saved in the draft's config; training passes make no cache.")
    logging_nan_inf_filter: bool = option(
        False, "Leave off: a loss that is not finite stops the run instead of being hidden."
    )

    hub_strategy: str = option("end", "Only 'end': a draft is published whole, in one commit, after training.")

    target_model_revision: str | None = option(
        None, "Revision of the target, when given as an id: the draft is made for it."
    )
    target_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for loading the target, as JSON: dtype, device_map, quantization_config, gguf_file."
    )
    shard_target: bool = option(True, "Whether FSDP shards the target too; False keeps it whole on each process.")
    divergence: str = option(
        "forward_kl", f"How draft and target are compared at each token: {', '.join(DIVERGENCES)}."
    )
    loss_temperature: float = option(1.0, "Temperature of both distributions inside the loss; unrelated to sampling.")
    beta: float = option(0.5, "Mixture weight of generalized_jsd: 0 is forward KL, 1 is reverse KL.")
    eta: float = option(3.0, "How fast lk_hybrid moves from KL to total variation as acceptance grows.")
    tvd_estimator: str = option("sampled", "tvd_plus_plus: 'sampled' (one token per position) or 'full'.")
    tvd_statistics: str = option("batch", "tvd_plus_plus: rewards are normalised over the 'batch' or per 'token'.")
    cross_entropy_weight: float = option(0.0, "Share of the loss that is cross-entropy on the completion, in [0, 1].")
    draft_vocabulary: list[int] | str | None = option(
        None, "'recorded': the draft learns to propose only the tokens that `draftkd vocabulary` chose."
    )
    parallel_tokens: int = option(1, "Tokens that the draft learns to predict in one pass; 1 is an ordinary draft.")
    parallel_weights: str = option(
        "uniform", "Deeper tokens count 'uniform', or by the target's 'confidence' in those before them."
    )
    mix: str | None = option(None, "Parts of training data to parts of `mix_dataset`: 9:1 where one is given.")
    lmbda: float = option(0.0, "Share of the steps whose completions the draft writes: 1.0 is on-policy.")
    seq_kd: bool = option(False, "Let the target write the completions of all other steps.")
    skd_top_k: int | None = option(None, "The target replaces tokens of the draft outside its own k likeliest (SKD).")
    max_new_tokens: int = option(128, "Longest completion written while training.")
    generation_temperature: float = option(1.0, "Temperature of completions written while training; 0 is greedy.")
    generation_top_p: float = option(1.0, "Probability mass they are sampled from.")
    generation_top_k: int = option(0, "Number of likeliest tokens they are sampled from; 0 is all.")
    token_selection: str = option("all", f"Which completion tokens are learned from: {', '.join(TOKEN_SELECTIONS)}.")
    selected_share: float = option(0.4, "Share of the tokens that token_selection='adaspec' learns from, in (0, 1].")
    eval_num_assistant_tokens: int = option(5, "Draft length at which eval_block_efficiency is reported.")

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "target_model_init_kwargs"]

    def __post_init__(self) -> None:
        # Checked first: a wrong value should be named before anything else is set up.
        self._check_distillation_values()
        # Otherwise each process would train alone, into the others' folder.
        self.use_cpu = self.use_cpu or launched_on_cpus()
        if self.bf16 is None and not self.fp16:
            # TRL would turn bf16 on, and transformers then refuses to start without an accelerator.
            self.bf16 = bf16_is_usable() and not self.use_cpu
        if self.ddp_find_unused_parameters is None:
            # Every parameter of a causal LM is used in every step; looking for others costs a pass over the graph.
            self.ddp_find_unused_parameters = False
        if not torch.accelerator.is_available():
            # Pinned memory serves copies to an accelerator; without one torch only warns.
            self.dataloader_pin_memory = False
        if self.gradient_checkpointing is None and self.activation_checkpointing is None:
            # Only here: a default of False in the field of the older name would be taken for the user's wish.
            self.activation_checkpointing = False
        if self.load_best_model_at_end and self.metric_for_best_model is None and self.divergence == "tvd_plus_plus":
            # transformers would choose by the loss. Block efficiency needs text that the target wrote, this does not.
            self.metric_for_best_model = "eval_acceptance_rate"
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # Batches of several processes are padded to different lengths, and cannot be cut out of one. SFTTrainer
            # sees to it where the training data is a stream, not where the evaluation data is.
            self.accelerator_config.dispatch_batches = False
        follows_metric = self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        if follows_metric and self.greater_is_better:
            # They take every metric for a loss, and would lower the rate where acceptance rises.
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        template = self.chat_template_path
        if template is not None and not (os.path.isfile(template) and template.endswith((".jinja", ".j2"))):
            raise ValueError(
                f"`chat_template_path={template!r}` is not a `.jinja` file. From a model TRL would take tokens too, "
                "and resize the draft's vocabulary, which must stay the target's. Save the template in a file, or "
                "set it: `tokenizer.chat_template`."
            )
        for name, (default, reason) in _REFUSED.items():
            if getattr(self, name) != default:
                raise ValueError(f"`{name}={getattr(self, name)!r}` cannot be used when distilling. {reason}")

    def _check_distillation_values(self) -> None:
        get_divergence(self.divergence)
        in_range("learning_rate", self.learning_rate, 0)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            whole_number(name, getattr(self, name))
        in_range("loss_temperature", self.loss_temperature, 0, open_low=True)
        in_range("eta", self.eta, 0)
        in_range("selected_share", self.selected_share, 0, 1, open_low=True)
        for name in ("beta", "cross_entropy_weight", "lmbda"):
            in_range(name, getattr(self, name), 0, 1)
        if not self.needs_target and self.loss_temperature != 1:
            raise ValueError(
                f"Cross-entropy on text has no temperature, got `loss_temperature={self.loss_temperature}`."
            )
        if self.mix is not None:
            parse_mix(self.mix)
        whole_number("eval_num_assistant_tokens", self.eval_num_assistant_tokens)
        one_of("`tvd_estimator`", self.tvd_estimator, ("sampled", "full"))
        one_of("`tvd_statistics`", self.tvd_statistics, ("batch", "token"))
        if isinstance(self.draft_vocabulary, str):
            one_of("`draft_vocabulary`", self.draft_vocabulary, ("recorded",))
        one_of("`token_selection`", self.token_selection, TOKEN_SELECTIONS)
        self._check_parallel()
        self._check_writing()

    def refuse_idle_loss_options(self) -> None:
        """A `ValueError` for an option of the loss that none of ours would read."""
        for name in given_fields(self, _OPTIONS_OF_LOSSES):
            other, value = _OPTIONS_OF_LOSSES[name]
            if getattr(self, other) != value:
                raise ValueError(f'`{name}` would do nothing without `{other}="{value}"`. Leave it out, or add that.')

    def _check_parallel(self) -> None:
        whole_number("parallel_tokens", self.parallel_tokens, 1, DRAFT_LENGTHS[-1])
        one_of("`parallel_weights`", self.parallel_weights, ("uniform", "confidence"))
        if self.parallel_tokens == 1:
            if given_fields(self, ["parallel_weights"]):
                raise ValueError("`parallel_weights` would do nothing without `parallel_tokens`. Leave it out.")
            return
        if self.packing or self.padding_free:
            raise ValueError(
                "`parallel_tokens` needs rows of one text each: its attention mask grows with the square of a row, and "
                "a packed row is as long as all its texts. Leave out `packing` and `padding_free`."
            )
        if self.token_selection != "all":
            raise ValueError(
                f"`token_selection={self.token_selection!r}` chooses among next tokens, but `parallel_tokens` learns "
                "each token at several depths. Leave one of them out."
            )
        if self.parallel_weights == "confidence" and not self.needs_target:
            raise ValueError(
                '`parallel_weights="confidence"` needs the target\'s probabilities, but cross-entropy reads only its '
                "text. Leave it out, or choose a `divergence` that compares the draft with its target."
            )

    def _check_writing(self) -> None:
        whole_number("max_new_tokens", self.max_new_tokens)
        if self.skd_top_k is not None:
            whole_number("skd_top_k", self.skd_top_k)
        try:
            _ = self.generation_setting
        except ValueError as error:
            raise ValueError(f"`generation_temperature`, `generation_top_p`, `generation_top_k`: {error}") from error
        for name in given_fields(self, _OPTIONS_OF_WRITING):
            if not self.writes_completions:
                raise ValueError(
                    f"`{name}` would do nothing: with `lmbda=0` and no `seq_kd` nothing is written while training. "
                    "Leave it out, or set one of these."
                )
        if self.lmbda == 1 and self.seq_kd:
            raise ValueError("`lmbda=1` leaves no step to the target: `seq_kd=True` would do nothing. Leave one out.")
        if self.skd_top_k is not None and not self.lmbda:
            raise ValueError(
                "`skd_top_k` says how the target corrects what the draft writes, but `lmbda=0` lets it write nothing. "
                "Set `lmbda=1`, or a share."
            )
        if self.lmbda and not (self.needs_target and self.cross_entropy_weight == 0):
            raise ValueError(
                f"`lmbda={self.lmbda:g}` lets the draft write, and cross-entropy would reward it for whatever it "
                "wrote. Choose a `divergence` that compares it with the target and `cross_entropy_weight=0`; the "
                "target's own text is `seq_kd=True`."
            )
        if self.writes_completions and (self.packing or self.padding_free):
            raise ValueError(
                "Completions that are written while training come in padded batches: leave out `packing` and "
                "`padding_free` with `lmbda` or `seq_kd`."
            )

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, which makes JSON of the draft's quantisation config, but not of the target's."""
        made = super().to_dict()
        kwargs = made["target_model_init_kwargs"]
        if isinstance(kwargs, dict) and hasattr(kwargs.get("quantization_config"), "to_dict"):
            quantization = kwargs["quantization_config"].to_dict()
            made["target_model_init_kwargs"] = kwargs | {"quantization_config": quantization}
        return made

    @property
    def writes_completions(self) -> bool:
        """Whether completions are written while training."""
        return self.lmbda > 0 or self.seq_kd

    @property
    def generation_setting(self) -> DecodingSetting:
        """How completions are decoded while training."""
        return DecodingSetting(self.generation_temperature, self.generation_top_p, self.generation_top_k)

    @property
    def divergence_options(self) -> dict[str, Any]:
        """The keyword arguments that `divergence` takes, from the fields above."""
        options: dict[str, dict[str, Any]] = {
            "generalized_jsd": {"beta": self.beta},
            "lk_hybrid": {"eta": self.eta},
            "tvd_plus_plus": {"estimator": self.tvd_estimator, "statistics": self.tvd_statistics},
        }
        return options.get(self.divergence, {})

    @property
    def needs_target(self) -> bool:
        """Whether the loss reads the target's distributions (white box)."""
        return reads_target(self.divergence, self.cross_entropy_weight)
