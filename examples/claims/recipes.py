"""How drafts are trained: recipes, which are told apart by their names and shared by the claims that need them."""

from dataclasses import dataclass
from typing import Any

TEMPERATURES = {"greedy": 0.0, "T=1": 1.0}
KEPT_TOKENS = 128  # likeliest tokens of each distribution that are kept for training
KEPT, LIVE, WRITTEN = "kept", "live", "written"
STOCK, BRIEFLY, TUNED, RANDOM = "stock", "briefly tuned", "tuned", "random"
TUNED_SHARE = {BRIEFLY: 1 / 4, TUNED: 1}  # of `Sizes.tuning_steps`


@dataclass(frozen=True)
class Sizes:
    """How much of everything; recorded with each result, since results of other sizes do not compare.

    `general` alone may differ: nothing is trained on these prompts, and a comparison says how many it rests on.
    """

    prompts: int = 160  # training queries, each answered greedily and at temperature 1
    test: int = 200
    dev: int = 64
    general: int = 160
    answer_tokens: int = 96
    query_tokens: int = 192
    batch_size: int = 8
    tuning_prompts: int = 320  # queries with given answers, other ones than the training queries
    tuning_steps: int = 60
    domain_steps: int = 120  # with which the target itself is tuned on a domain

    @property
    def first_tuning_query(self) -> int:
        """Behind all queries that any claim trains on: four times as many as usual, at most."""
        return 4 * self.prompts


FULL = Sizes()
SIZES = {
    "full": FULL,
    # For a target that takes seconds to answer. As many test queries as a verdict asks for.
    "small": Sizes(prompts=64, test=150, dev=32, general=150, answer_tokens=64, tuning_prompts=240, tuning_steps=30),
    # To try the scripts.
    "smoke": Sizes(
        prompts=4,
        test=2,
        dev=2,
        general=2,
        answer_tokens=4,
        batch_size=2,
        tuning_prompts=2,
        tuning_steps=1,
        domain_steps=1,
    ),
}


@dataclass(frozen=True)
class Recipe:
    """How a draft is trained. Two claims that need the same draft share it.

    Attributes:
        name: Part of the result's file name.
        start: What is trained: the `stock` draft, the `tuned` one (the stock draft after some steps on given answers),
            the `briefly tuned` one (after a quarter of these steps), or `random` weights.
        text: What is learned from: the target's answers to `queries` or to `synthetic` ones, the smaller target's
            (`queries_of_small`), or `fixed` answers.
        prompts: Number of training queries as a multiple of `Sizes.prompts`.
        epochs: Passes over the text. 0: the draft is left as it starts.
        options: Further arguments of `DraftDistillConfig`.
        loss: One of `LOSSES` instead of a divergence.
        general_share: Whether every tenth row is general text.
        also_on: Evaluation texts beside `test` and `dev`.
        keep_at: Shares of training at which the draft is scored too.
    """

    name: str
    start: str = TUNED
    text: str = "queries"
    prompts: float = 1
    epochs: float = 3
    options: tuple[tuple[str, Any], ...] = ()
    loss: str | None = None
    general_share: bool = False
    also_on: tuple[str, ...] = ()
    keep_at: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        """What training takes: `kept` distributions, a `live` target, or text that is `written` while training."""
        if "lmbda" in dict(self.options):
            return WRITTEN
        return LIVE if self.general_share or self.loss is not None else KEPT


def cell_name(what: Any, rate: float | None, seed: int) -> str:
    """The name of a cell, in file names."""
    return f"{what.name}{'' if rate is None else f'_rate{rate:g}'}_seed{seed}"


def recipe(name: str, **fields: Any) -> Recipe:
    """A `Recipe`; whatever is no field of it is an argument of `DraftDistillConfig`."""
    own = {key: fields.pop(key) for key in list(fields) if key in Recipe.__dataclass_fields__}
    return Recipe(name, options=tuple(sorted(fields.items())), **own)


WHITE_BOX = recipe("queries_forward_kl", also_on=("general",))
"""The recipe that most claims compare with: forward KL on the target's answers, three epochs from the tuned draft."""
STANDARD_RATE = 1.5e-3  # of the draft that experiments on decoding use

BLACK_BOX = recipe("queries_cross_entropy", divergence="cross_entropy")
TUNED_DRAFT = recipe("tuned", epochs=0, also_on=("general",))
BRIEFLY_TUNED_DRAFT = recipe("briefly_tuned", start=BRIEFLY, epochs=0)
STOCK_DRAFT = recipe("stock", start=STOCK, epochs=0, also_on=("general",))
