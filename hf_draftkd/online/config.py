"""What learning from served traffic is made of: how often, from how much, and how cautiously."""

from dataclasses import dataclass, field
from typing import Any

from hf_draftkd.losses import check_divergence
from hf_draftkd.utils.checks import in_range, whole_number


@dataclass
class OnlineDistillConfig:
    """Configuration class for the [`OnlineDraftDistiller`].

    A server has no epochs, no evaluation data and no end, so this is not a `TrainingArguments`; the few names that mean
    the same there are the same here.

    Parameters:
        > Parameters that control when the draft learns

        update_every (`int`, *optional*, defaults to `16`):
            Requests between two updates, those held out for the gate included.
        auto_update (`bool`, *optional*, defaults to `True`):
            Whether [`OnlineDraftDistiller.generate`] runs an update that is due by itself, after its text is complete
            and before it returns. Otherwise call [`OnlineDraftDistiller.step`] when the server is idle.

        > Parameters that control what it learns from

        buffer_size (`int`, *optional*, defaults to `256`):
            Served requests kept to learn from; the oldest make room. One completion token takes
            `8 * top_k + 12` bytes.
        top_k (`int`, *optional*, defaults to `64`):
            How many of the target's likeliest tokens are kept of each distribution, with the total probability of the
            others. A smaller vocabulary is kept whole.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest prompt and completion together that is learnt from, in tokens. Longer completions are cut; a
            request whose prompt alone is that long is served but not learnt from.
        replay_ratio (`float`, *optional*, defaults to `1.0`):
            How many older requests an update sees again for each new one, which keeps the draft from forgetting the
            traffic of an hour ago.
        num_epochs (`int`, *optional*, defaults to `2`):
            Passes of an update over its requests; older ones are drawn again for each.
        batch_size (`int`, *optional*, defaults to `8`):
            Requests per gradient step.

        > Parameters that control the loss and the optimiser

        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            As in [`DraftDistillConfig`]; `cross_entropy` learns from the served text alone.
        divergence_options (`dict[str, Any]`, *optional*):
            What the divergence takes: `{"beta": 0.1}` for `generalized_jsd`, `{"eta": 3.0}` for `lk_hybrid`,
            `{"estimator": "full"}` for `tvd_plus_plus`.
        loss_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature both distributions are softened with inside the loss. It has nothing to do with sampling, and
            is fixed when a distribution is kept.
        cross_entropy_weight (`float`, *optional*, defaults to `0.0`):
            Share w of the loss that is cross-entropy on the text: (1 - w) * divergence + w * cross-entropy.
        learning_rate (`float`, *optional*, defaults to `3e-4`):
            Learning rate of AdamW; constant, since traffic does not end.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of AdamW.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Gradients are scaled down to this norm.

        > Parameters that control the gate

        holdout_share (`float`, *optional*, defaults to `0.25`):
            Share of the prompts whose requests are never learnt from, but measure every update; at most 0.5. The prompt
            itself decides, so that a question asked twice is never on both sides. 0 switches the gate off.
        holdout_size (`int`, *optional*, defaults to `16`):
            Held-out requests kept; the oldest make room.

        > Parameters that control the rest

        output_dir (`str`, *optional*):
            Where the state is saved automatically; see [`OnlineDraftDistiller.save`]. `None` saves nothing.
        save_every (`int`, *optional*, defaults to `16`):
            Requests between two saves: the most that a crash can lose.
        max_history (`int`, *optional*, defaults to `1000`):
            Entries of [`OnlineDraftDistiller.history`] that are kept.
        seed (`int`, *optional*, defaults to `0`):
            Decides which requests are held out and which older ones are seen again.

    Raises:
        ValueError: A value is out of range or not one of the known names.
    """

    update_every: int = 16
    auto_update: bool = True

    buffer_size: int = 256
    top_k: int = 64
    max_length: int = 2048
    replay_ratio: float = 1.0
    num_epochs: int = 2
    batch_size: int = 8

    divergence: str = "forward_kl"
    divergence_options: dict[str, Any] = field(default_factory=dict)
    loss_temperature: float = 1.0
    cross_entropy_weight: float = 0.0
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    holdout_share: float = 0.25
    holdout_size: int = 16

    output_dir: str | None = None
    save_every: int = 16
    max_history: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("update_every", "buffer_size", "top_k", "max_length", "num_epochs", "batch_size", "holdout_size")
        for name in (*counts, "save_every", "max_history"):
            whole_number(name, getattr(self, name))
        whole_number("seed", self.seed, 0)
        in_range("replay_ratio", self.replay_ratio, 0)
        in_range("weight_decay", self.weight_decay, 0)
        in_range("cross_entropy_weight", self.cross_entropy_weight, 0, 1)
        # At least half of the requests are learnt from.
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
        return self.divergence != "cross_entropy" and self.cross_entropy_weight < 1
