"""What happens around training: models are tried before the first step, acceptance is measured and plotted."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_draftkd.data.parallel import check_reads_mask_tokens
from hf_draftkd.models.forward import unwrapped
from hf_draftkd.models.pairing import copy_special_ids
from hf_draftkd.training.packing import check_packing, longest_packed_row
from hf_draftkd.utils.checks import in_range, whole_number
from hf_draftkd.utils.files import replacing

logger = logging.getLogger(__name__)

PLOT = "training.png"


def with_acceptance(callbacks: list[TrainerCallback] | None) -> list[TrainerCallback]:
    """The callbacks, with one for acceptance."""
    given = callbacks or []
    # Trainer takes a class as well, and makes one.
    is_given = any(each is AcceptanceCallback or isinstance(each, AcceptanceCallback) for each in given)
    return given if is_given else [*given, AcceptanceCallback()]


def asked_metrics(callbacks: list[TrainerCallback], usual_length: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Draft lengths beside `usual_length`, and temperatures, that a trainer's present callbacks ask for."""
    asking = [callback for callback in callbacks if isinstance(callback, AcceptanceCallback)]
    lengths = {length for callback in asking for length in callback.num_assistant_tokens}
    temperatures = {temperature for callback in asking for temperature in callback.temperatures}
    return tuple(sorted(lengths - {usual_length})), tuple(sorted(temperatures))


class BeforeFirstStep(TrainerCallback):
    """What has to wait until the models lie where they are trained.

    - The draft gets the target's bos, eos and pad ids back, which transformers replaces by the tokenizer's. Assisted
      decoding compares draft and target by theirs, and a target may end its texts with other tokens than the tokenizer
      names, or with none.
    - A model that cannot read packed rows as separate texts is refused where rows are packed, and one that cannot read
      blocks of mask tokens where it is to learn several tokens in one pass.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._trainer
        draft, target, parallel = trainer.model_wrapped, trainer.target_model, trainer.parallel
        if target is not None:
            copy_special_ids(unwrapped(draft), unwrapped(target))
        if trainer.padding_free:
            length = longest_packed_row(trainer.train_dataset, args.train_batch_size, args.max_length)
            reference = getattr(trainer.reference_signal, "model", None)
            for name, model in (("draft", draft), ("target", target), ("reference model", reference)):
                if model is not None:
                    check_packing(model, name, length)
        if parallel is not None:
            check_reads_mask_tokens(draft, parallel.mask_token_id, parallel.num_tokens, args.max_length or 0)


class AcceptanceCallback(TrainerCallback):
    """Says while a draft is trained how often its target would accept it.

    [`DraftDistillTrainer`] adds one; pass your own to choose the draft lengths, or remove it with
    `trainer.remove_callback(AcceptanceCallback)`.

    - `trainer.evaluate()` also reports `eval_block_efficiency_at_γ` (tokens per target call) at each of its draft
      lengths. Like all metrics they go wherever `report_to` says, and `metric_for_best_model` takes them.
    - `eval_acceptance_rate_t0.7` is the rate at which draft tokens are accepted when sampling at that temperature, on
      any text; at 0 it is the share of tokens where draft and target find the same one likeliest.
    - Block efficiency is exact only for text that the target wrote under the very setting. So
      `eval_block_efficiency_t0` and `eval_block_efficiency_at_γ_t0` are those of the rows recorded at temperature 0
      (`_t0.7_p0.95_k50_r1.1`: with top-p, top-k and a repetition penalty), and absent where there is no such row.
    - `eval_strategy="no"`, which would leave the held-out data unused, becomes `"epoch"`.
    - At the end of a training run that evaluated, `training.png` in `args.output_dir` shows loss, acceptance and block
      efficiency over steps. Needs matplotlib (`pip install "hf_draftkd[plots]"`); without it there is no plot.

    Args:
        num_assistant_tokens (`Sequence[int]`, *optional*): Draft lengths γ, beside `args.eval_num_assistant_tokens`.
        temperatures (`Sequence[float]`, *optional*): Sampling temperatures; 0 is greedy decoding.
        plot (`bool`, *optional*): Whether to save the plot.

    Raises:
        ValueError: A draft length is not a whole number of 1 or above, or a temperature not a number of 0 or above.
    """

    def __init__(
        self,
        num_assistant_tokens: Sequence[int] = (1, 3, 8),
        *,
        temperatures: Sequence[float] = (0, 1),
        plot: bool = True,
    ) -> None:
        lengths = (whole_number("num_assistant_tokens", length) for length in num_assistant_tokens)
        self.num_assistant_tokens = tuple(lengths)
        # Six digits are what a batch's float32 keeps of a recorded temperature.
        self.temperatures = tuple(float(f"{in_range('temperatures', each, 0):.6g}") for each in temperatures)
        self.plot = plot

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not (self.plot and state.is_world_process_zero and args.output_dir):
            return
        if not any(key.startswith("eval_") for entry in state.log_history for key in entry):
            return
        from hf_draftkd.evaluation.plots import training_figure

        try:
            figure = training_figure(state.log_history)
        except ImportError as error:
            logger.info("No plot of the training was made. %s", error)
            return
        if figure is None:
            return
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        with replacing(Path(args.output_dir, PLOT)) as unfinished:
            figure.savefig(unfinished, format="png")
