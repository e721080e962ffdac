"""What the claims are tried on: a pair, texts of its target, and drafts trained by recipes.

Everything that several cells need is made once and kept in the work folder, under the pair it belongs to: texts with
the target's distributions, the draft that training starts from, and trained drafts.
"""

import functools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from recipes import (
    FULL,
    KEPT,
    KEPT_TOKENS,
    RANDOM,
    STANDARD_RATE,
    STOCK,
    TEMPERATURES,
    TUNED_SHARE,
    WHITE_BOX,
    WRITTEN,
    Recipe,
    Sizes,
    cell_name,
)
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from hf_draftkd import (
    DraftDistillConfig,
    DraftDistillTrainer,
    build_draft,
    cache_target_distributions,
    generate_alignment_data,
    load_draft,
    load_prompts,
    load_target,
    load_tokenizer,
    synthesize_prompts,
)
from hf_draftkd.data.curation import curate_prompts
from hf_draftkd.data.rows import with_token_ids
from hf_draftkd.models.demo import DEMO
from hf_draftkd.models.identity import weights_checksum

# The examples beside this folder: the demo pair's queries, documents to be continued.
sys.path.append(str(Path(__file__).resolve().parent.parent))

FACTS = "facts.json"  # what training a draft took, beside its weights


def pair_weights(pair: Path) -> dict[str, str]:
    """The checksums of a pair's weights: its results are never taken for another's."""
    return {name: weights_checksum(pair / name) for name in ("target", "draft")}


def pair_id(weights: dict[str, str]) -> str:
    """A short name of a pair, for folders."""
    return "-".join(checksum[:8] for checksum in weights.values())


class Lab:
    """One pair and everything made from it.

    Args:
        pair: Folder with `target`, `draft`, and queries, `train.jsonl`, `dev.jsonl` and `test.jsonl`: with the columns
            `prompt`, `reference` (the right answer) and, for claims that judge answers, `function`. A draft with a
            list of ids is trained and scored as proposing these alone.
        work_dir: Where what is made is kept.
        sizes: How much of everything.
        data_dir: Folder with public prompts, for the claims that need them.
        mask_token: Of parallel drafts, where the vocabulary has none in reserve.
    """

    def __init__(
        self,
        pair: Path = DEMO,
        work_dir: Path = Path("claims_work"),
        sizes: Sizes = FULL,
        data_dir: Path | None = None,
        mask_token: str | None = None,
    ) -> None:
        self.pair, self.sizes, self.data_dir, self.mask_token = pair, sizes, data_dir, mask_token
        self.weights = pair_weights(pair)
        self.folder = work_dir / pair_id(self.weights)
        record = self.folder / "sizes.json"
        if record.exists() and json.loads(record.read_text()) != vars(sizes):
            raise SystemExit(f"{self.folder} holds texts and drafts of other sizes. Name another --work_dir.")
        self.folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(vars(sizes)))
        self._texts: dict[tuple[str, float], Dataset] = {}
        self._asked: dict[str, Dataset] = {}

    # Models ----------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def target(self) -> PreTrainedModel:
        return load_target(str(self.pair / "target"), dtype="float32")

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(str(self.pair / "target"))

    def draft(self, start: str, seed: int = 0) -> PreTrainedModel:
        """A fresh copy of what training starts from."""
        if start == RANDOM:
            stock = load_draft(str(self.pair / "draft"), dtype="float32")
            return build_draft(self.target, config=stock.config, seed=seed, dtype=torch.float32)
        return load_draft(str(self.start(start)), dtype="float32")

    def start(self, name: str) -> Path:
        """The stock draft, or what some steps of cross-entropy on given answers to queries of its own make of it."""
        if name == STOCK:
            return self.pair / "draft"
        folder = self.folder / name.replace(" ", "_")
        if not folder.exists():
            rows = self.given_answers(self.sizes.first_tuning_query, self.sizes.tuning_prompts)
            steps = max(1, round(TUNED_SHARE[name] * self.sizes.tuning_steps))
            options = {"max_steps": steps, "divergence": "cross_entropy"}
            self.distil(self.draft(STOCK), rows, folder, rate=1e-3, seed=0, **options)
        return folder

    @functools.cached_property
    def small(self) -> PreTrainedModel:
        """A smaller target: half of the target's layers, distilled from its answers to twice the training queries."""
        folder = self.folder / "small"
        if not folder.exists():
            layers = max(1, self.target.config.num_hidden_layers // 2)
            start = build_draft(self.target, num_layers=layers, tokenizer=self.tokenizer)
            self.distil(start, self.text("queries", 2), folder, rate=1e-3, seed=0, num_train_epochs=2)
        return load_target(str(folder), dtype="float32")

    # Texts -----------------------------------------------------------------------------------------------------------

    def given_answers(self, first: int, count: int) -> Dataset:
        """Queries with the right call as their answer: fixed data, which no model wrote."""
        rows = Dataset.from_json(str(self.pair / "train.jsonl"), cache_dir=str(self.folder / "cache"))
        return with_token_ids(with_references(rows.select(range(first, first + count))), self.tokenizer)

    def text(self, name: str, prompts: float = 1) -> Dataset:
        """Training rows with the target's distributions; written once.

        `queries` and `fixed` of more prompts begin with those of fewer. `synthetic` rows hold, as nearly as whole rows
        allow, as many completion tokens as the usual number of `queries`.
        """
        if (name, prompts) not in self._texts:
            self._texts[name, prompts] = self._text(name, prompts)
        return self._texts[name, prompts]

    def _text(self, name: str, prompts: float) -> Dataset:
        count = round(prompts * self.sizes.prompts)
        if name == "fixed":
            rows = self.given_answers(0, count)
            return cache_target_distributions(
                rows, self.target, top_k=KEPT_TOKENS, tokenizer=self.tokenizer, batch_size=16
            )
        if name == "synthetic":
            return self._synthetic()
        # In parts, so that nothing is answered before a claim needs it.
        parts = []
        for start in range(0, count, self.sizes.prompts):
            asked = load_prompts(str(self.pair / "train.jsonl"), limit=start + self.sizes.prompts)
            asked = asked.select(range(start, len(asked)))
            target = self.target if name == "queries" else self.small
            parts.append(self._answered(asked, f"{name}_from_{start}", target, keeps=True))
        return concatenate_datasets(parts).select(range(len(TEMPERATURES) * count))  # in the order of the prompts

    def _synthetic(self) -> Dataset:
        """As many whole rows as reach the tokens of the usual queries."""
        budget = sum(map(len, self.text("queries")["completion_ids"]))
        queries, counts = synthesize_prompts(
            self.target,
            self.tokenizer,
            2 * self.sizes.prompts,
            max_new_tokens=self.sizes.query_tokens,
            batch_size=16,
            output_dir=self.folder / "synthetic_queries",
        )
        facts = {"scenario": "synthetic", "prompt_counts": counts}
        rows = self._answered(queries, "synthetic", self.target, keeps=True, **facts)
        total = 0
        for number, ids in enumerate(rows["completion_ids"]):
            total += len(ids)
            if total >= budget:
                return rows.select(range(number + 1))
        raise SystemExit(f"The target wrote {total} tokens of synthetic text, of {budget} that are needed.")

    def questions(self, name: str) -> Any:
        """The prompts of an evaluation text: `test`, `dev`, or `general` documents to be continued."""
        if name != "general":
            return load_prompts(str(self.pair / f"{name}.jsonl"), limit=getattr(self.sizes, name))
        from alignment_data import docstrings

        openings, _ = curate_prompts(docstrings().shuffle(seed=0), self.tokenizer, opening_tokens=32)
        return openings.select(range(min(self.sizes.general, len(openings))))

    def asked(self, name: str) -> Dataset:
        """An evaluation text: what the target answers to these prompts."""
        if name not in self._asked:
            self._asked[name] = self._answered(self.questions(name), f"asked_{name}", self.target)
        return self._asked[name]

    @functools.cached_property
    def right_answers(self) -> Dataset:
        """The test queries with their references."""
        return with_token_ids(with_references(self.questions("test")), self.tokenizer)

    def _answered(
        self, prompts: Any, name: str, target: PreTrainedModel, *, keeps: bool = False, **options: Any
    ) -> Dataset:
        """What a target answers; with `keeps` its distributions are kept too."""
        return generate_alignment_data(
            target,
            self.tokenizer,
            prompts,
            max_new_tokens=self.sizes.answer_tokens,
            temperatures=tuple(TEMPERATURES.values()),
            batch_size=32,
            cache_distributions={"top_k": KEPT_TOKENS} if keeps else None,
            output_dir=self.folder / name,
            **options,
        )

    @functools.cached_property
    def general_text(self) -> Dataset:
        """Plain text of the kind that draft and target were pretrained on."""
        from demo_pair.corpus import training_documents

        pieces = [text[start : start + 600] for text in training_documents() for start in range(0, len(text), 600)]
        return Dataset.from_dict({"text": pieces}).shuffle(seed=0).select(range(2 * self.sizes.prompts))

    # Training --------------------------------------------------------------------------------------------------------

    def distil(
        self,
        draft: PreTrainedModel,
        rows: Dataset,
        folder: Path,
        *,
        rate: float,
        seed: int,
        loss: str | None = None,
        keep_at: Sequence[int] = (),
        extras: dict[str, Any] | None = None,
        made_as: Any = None,
        **options: Any,
    ) -> None:
        """Train a draft (or a target) in float32 with a rate that falls to 0, and save it.

        Args:
            draft: Trained in place.
            rows: What it learns from.
            folder: Where it is saved at last, whole or not at all, with its facts. `seconds` are processor time of
                this process, of which other programs take none.
            rate: The first learning rate.
            seed: Of the order of the rows.
            loss: One of `LOSSES`.
            keep_at: Steps after which the draft is saved too, in `step_N`.
            extras: Further arguments of the trainer.
            made_as: Kept among the facts.
            **options: Further arguments of `DraftDistillConfig`.
        """
        scratch = Path(tempfile.mkdtemp(dir=self.folder))
        if recorded_list(draft) is not None:
            options = {"draft_vocabulary": "recorded"} | options
        args = DraftDistillConfig(
            output_dir=str(scratch / "trainer"),
            learning_rate=rate,
            lr_scheduler_type="linear",
            per_device_train_batch_size=self.sizes.batch_size,
            seed=seed,
            data_seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        trainer = LOSSES[loss](
            model=draft,
            args=args,
            train_dataset=rows,
            processing_class=self.tokenizer,
            callbacks=[KeepWeights(keep_at, scratch)],
            **(extras or {}),
        )
        trainer.remove_callback(PrinterCallback)
        began = time.process_time()
        trainer.train()
        facts = {"steps": trainer.state.global_step, "rows": len(rows), "made_as": made_as}
        facts["seconds"] = round(time.process_time() - began, 2)
        trainer.model.save_pretrained(scratch)
        (scratch / FACTS).write_text(json.dumps(facts))
        shutil.rmtree(scratch / "trainer", ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        scratch.rename(folder)

    def trained(self, recipe: Recipe, rate: float | None, seed: int) -> Path:
        """The folder of a draft, which is trained where it is not there. A draft that is left alone is where it was.

        Raises:
            SystemExit: The draft that is there was trained by another recipe of that name.
        """
        if not recipe.epochs:
            return self.start(recipe.start)
        folder = self.folder / "drafts" / cell_name(recipe, rate, seed)
        made_as = json.loads(json.dumps(asdict(recipe)))
        if folder.exists():
            if json.loads((folder / FACTS).read_text(encoding="utf-8"))["made_as"] != made_as:
                raise SystemExit(f"{folder} was trained by another recipe than the scripts say now: remove it.")
            return folder
        assert rate is not None, "an arm that is trained has a rate"
        rows, options = self.text(recipe.text, recipe.prompts), dict(recipe.options)
        steps = max(1, round(recipe.epochs * len(rows) / self.sizes.batch_size))
        extras: dict[str, Any] = {}
        if recipe.kind == WRITTEN:
            options["max_new_tokens"] = self.sizes.answer_tokens
        if recipe.kind != KEPT:
            extras["target_model"] = self.target
        if recipe.general_share:
            extras["mix_dataset"] = self.general_text
        if options.get("token_selection") == "adaspec":
            reference = self.trained(WHITE_BOX, STANDARD_RATE, seed)
            extras["reference_model"] = load_draft(str(reference), dtype="float32")
        draft = self.draft(recipe.start, seed)
        if self.mask_token is not None and options.get("parallel_tokens"):
            draft.config.pard_token = self.tokenizer.get_vocab()[self.mask_token]
        self.distil(
            draft,
            rows,
            folder,
            rate=rate,
            seed=seed,
            loss=recipe.loss,
            keep_at=[max(1, round(share * steps)) for share in recipe.keep_at],
            extras=extras,
            made_as=made_as,
            max_steps=steps,
            **options,
        )
        return folder


def recorded_list(draft: PreTrainedModel) -> list[int] | None:
    """The ids that a draft proposes, None for all of them."""
    return getattr(draft.generation_config, "draft_vocabulary", None)


def with_references(rows: Dataset) -> Dataset:
    """Queries with the right call as their answer."""
    answers = [[{"role": "assistant", "content": text}] for text in rows["reference"]]
    return Dataset.from_dict({"prompt": rows["prompt"], "completion": answers})


class KeepWeights(TrainerCallback):
    """Saves the draft after some of the steps."""

    def __init__(self, steps: Sequence[int], folder: Path) -> None:
        self._steps, self._folder = steps, folder

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            model.save_pretrained(self._folder / f"step_{state.global_step}")


class UnweightedRewards(DraftDistillTrainer):
    """TVD++ as a third-party trainer reads it: rewards 1{p > q}, normalised over the vocabulary of each position, push
    log q of every token alike, without the weight q that makes the others a policy gradient.
    """

    def token_loss(self, draft_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
        """The surrogate at each position `[n]`, from logits `[n, V]`."""
        log_q = draft_logits.log_softmax(-1)
        reward = (target_logits.softmax(-1) > log_q.exp()).to(log_q)
        advantage = (reward - reward.mean(-1, keepdim=True)) / reward.std(-1, keepdim=True).clamp(min=1e-6)
        return -(advantage.detach() * log_q).mean(-1)


LOSSES = {None: DraftDistillTrainer, "unweighted_rewards": UnweightedRewards}
