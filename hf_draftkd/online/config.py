"""What learning from served traffic is made of: how often, from how much, and how cautiously."""

from dataclasses import dataclass
from typing import Any

from hf_draftkd.losses import check_divergence, reads_target
from hf_draftkd.utils.checks import in_range, whole_number
from hf_draftkd.utils.fields import option


@dataclass
class OnlineDistillConfig:
    """Configuration class for the [`OnlineDraftDistiller`]. The help text of a field says what it does.

    A server has no epochs, no evaluation data and no end, so this is not a `TrainingArguments`; the few names that mean
    the same there are the same here, and `divergence` is that of [`DraftDistillConfig`].

    Raises:
        ValueError: A value is out of range or not one of the known names.
    """

    # When the draft learns
    update_every: int = option(16, "Requests between two updates, those held out for the gate included.")
    auto_update: bool = option(
        True,
        "Whether `generate` runs an update that is due by itself, after its text is complete and before it returns; "
        "otherwise call `step` when the server is idle.",
    )

    # What it learns from
    buffer_size: int = option(
        256,
        "Served requests kept to learn from; the oldest make room. A completion token takes `8 * top_k + 12` bytes.",
    )
    top_k: int = option(
        64,
        "How many of the target's likeliest tokens are kept of each distribution, with the total probability of the "
        "others; a smaller vocabulary is kept whole.",
    )
    max_length: int = option(
        2048,
        "Longest prompt and completion together that is learned from, in tokens. Longer completions are cut; a request "
        "whose prompt alone is that long is served but not learned from.",
    )
    replay_ratio: float = option(
        1.0, "Older requests that an update sees again for each new one: so the draft keeps the traffic of an hour ago."
    )
    num_epochs: int = option(2, "Passes of an update over its requests; older ones are drawn again for each.")
    batch_size: int = option(8, "Requests per gradient step.")

    # The loss and the optimiser
    divergence: str = option("forward_kl", "How draft and target are compared; cross_entropy reads the text alone.")
    divergence_options: dict[str, Any] = option({}, "What it takes: beta of generalized_jsd, eta of lk_hybrid, ...")
    loss_temperature: float = option(
        1.0, "Temperature of both distributions inside the loss, fixed when one is kept; unrelated to sampling."
    )
    cross_entropy_weight: float = option(
        0.0, "Share w of cross-entropy on the text: (1 - w) * divergence + w * cross-entropy."
    )
    learning_rate: float = option(3e-4, "Learning rate of AdamW; constant, since traffic does not end.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")

    # The gate
    holdout_share: float = option(
        0.25,
        "Share of the prompts whose requests are never learned from, but measure every update; at most 0.5. The prompt "
        "itself decides, so that a question asked twice is never on both sides. 0 switches the gate off.",
    )
    holdout_size: int = option(16, "Held-out requests kept; the oldest make room.")

    # The rest
    output_dir: str | None = option(
        None, "Where the state is saved automatically, each server in a directory of its own; None saves nothing."
    )
    save_every: int = option(16, "Requests between two saves: the most that a crash can lose.")
    max_history: int = option(1000, "Entries of `history` that are kept.")
    seed: int = option(0, "Decides which requests are held out and which older ones are seen again.")

    def __post_init__(self) -> None:
        counts = ("update_every", "buffer_size", "top_k", "max_length", "num_epochs", "batch_size", "holdout_size")
        for name in (*counts, "save_every", "max_history"):
            whole_number(name, getattr(self, name))
        whole_number("seed", self.seed, 0)
        in_range("replay_ratio", self.replay_ratio, 0)
        in_range("weight_decay", self.weight_decay, 0)
        in_range("cross_entropy_weight", self.cross_entropy_weight, 0, 1)
        # At least half of the requests are learned from.
        in_range("holdout_share", self.holdout_share, 0, 0.5)
        for name in ("loss_temperature", "learning_rate", "max_grad_norm"):
            in_range(name, getattr(self, name), 0, open_low=True)
        check_divergence(self.divergence, self.divergence_options)
        if not self.needs_target and self.loss_temperature != 1:
            raise ValueError(
                f"Cross-entropy on text has no temperature, got `loss_temperature={self.loss_temperature}`."
            )

    @property
    def needs_target(self) -> bool:
        """Whether the loss reads the target's distributions, or only its text."""
        return reads_target(self.divergence, self.cross_entropy_weight)
