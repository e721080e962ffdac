"""What works with which architecture: a table over the causal LMs of the installed transformers.

    python examples/benchmarks/architectures.py [--output architectures.jsonl] [--only qwen3 gemma3_text] [--jobs 1]

A tiny model of every architecture (random weights, made from its config class) goes through the whole journey with a
draft that agrees in part: pairing, alignment data, a training step, packing, exact evaluation, `SpeculativeDecoding`
(one by one, and in a padded batch) and cutting. What is printed is the page `architectures.md`: what passes, what is
refused and why, what goes wrong.
Finished architectures lie in `--output` with the versions they were tried with, and are not tried again.
"""

import argparse
import copy
import re
import signal
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resumable import run_all

STEPS = ("pairing", "data", "training", "packing", "evaluation", "decoding", "batches", "cutting")
GAMMA = 5
NEW_TOKENS = 24
_SECONDS = 90  # some models that are not tiny would take all memory, given more
_SECONDS_TIMED = 240
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France?",
    "def add(left, right):",
    "Numbers: 0 1 2 3 4 5",
)


def main() -> None:
    from tiny_architectures import architectures

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("architectures.jsonl"))
    parser.add_argument("--only", nargs="+", metavar="MODEL_TYPE", help="these architectures instead of all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    options = parser.parse_args()
    wanted = {name: {"model_type": name} for name in options.only or architectures()}
    results = run_all(try_architecture, wanted, options.output, jobs=options.jobs)
    print(section(results))


def section(results: dict[str, dict[str, Any]]) -> str:
    """The results as the page `architectures.md`: who passes every step, and what else came out, grouped."""
    versions = next(iter(results.values()))["versions"]
    works = sorted(name for name, result in results.items() if all(result.get(step) == "ok" for step in STEPS))
    outcomes: dict[tuple[str, str], list[str]] = {}
    for name, result in sorted(results.items()):
        for step in ("model", *STEPS):
            if result.get(step, "ok") != "ok":
                outcomes.setdefault((step, _without_names(result[step])), []).append(name)
    made = (
        "`python examples/benchmarks/architectures.py` ("
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "): a tiny model of random weights of each architecture with a causal LM class, and a draft that agrees with "
        f"it in part, through {', '.join(STEPS[:-1])} and {STEPS[-1]}. Evaluation, timed, is exact: computed tokens "
        "per target call equal those counted, and the assisted text is the plain one. `SpeculativeDecoding` writes the "
        "plain texts, one by one and in a padded batch. Packing and padding give the same loss "
        "(not compared where a model draws at random in training, as phimoe's experts). A "
        "cut of all layers has the target's logits."
    )
    passed = f"{len(works)} of {len(results)} architectures pass every step: {', '.join(works)}."
    lines = [
        "# What works with which architecture",
        "",
        textwrap.fill(made, 120, break_on_hyphens=False),
        "",
        textwrap.fill(passed, 120, break_on_hyphens=False),
        "",
        "The others pass every step but those named here:",
        "",
        "| step | outcome | architectures |",
        "|---|---|---|",
    ]
    for (step, outcome), names in sorted(outcomes.items(), key=lambda item: ("model", *STEPS).index(item[0][0])):
        lines.append(f"| {step} | {outcome} | {', '.join(names)} |")
    return "\n".join(lines)


def _without_names(outcome: str) -> str:
    """The first sentence, without what differs between models of one kind, and as a cell of a table."""
    text = re.sub(r"'[^']*' \(model type '[^']*'\) | \(model type '[^']*'\)", "", outcome)
    text = re.sub(r"this '[^']*' (target|draft)", r"this \1", text, flags=re.IGNORECASE)
    return re.split(r"\.\s", text.replace("|", "\\|").replace("\n", " "))[0].rstrip(".")


def try_architecture(description: dict[str, Any]) -> dict[str, Any]:
    """Every step with one architecture; step -> "ok", "refused: ..." or "fault: ..."."""
    import logging
    import warnings

    import accelerate
    import torch
    import transformers
    import trl
    from tiny_architectures import tiny_model

    from hf_draftkd.models.demo import demo_path
    from hf_draftkd.models.loading import load_tokenizer, require_loaded

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model_type = description["model_type"]
    modules = (torch, transformers, trl, accelerate)
    result: dict[str, Any] = {"versions": {module.__name__: module.__version__ for module in modules}}
    tokenizer = load_tokenizer(demo_path("target"))

    def build() -> Any:
        ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        model = tiny_model(model_type, vocab_size=len(tokenizer), special_ids=ids)
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
        return model

    target = _attempt(build)
    if isinstance(target, str):
        # A stateful model is refused by its config, whether or not a tiny one can be made.
        refused = _attempt(lambda: _check_class(model_type))
        result["model"] = refused if refused != "ok" else "not tried, no tiny model: " + target.partition(": ")[2]
        return result
    refused = _attempt(lambda: require_loaded(target))
    if isinstance(refused, str):
        result["model"] = refused
        return result
    journey = _Journey(target, tokenizer)
    for step in STEPS:
        if step in ("training", "packing", "evaluation", "decoding", "batches") and result["data"] != "ok":
            result[step] = "not tried, no data"
            continue
        outcome = _attempt(getattr(journey, step), _SECONDS_TIMED if step == "evaluation" else _SECONDS)
        result[step] = outcome if isinstance(outcome, str) else "ok"
    return result


def _check_class(model_type: str) -> str:
    from transformers import CONFIG_MAPPING

    from hf_draftkd.models.resolve import check_config

    check_config(CONFIG_MAPPING[model_type](), model_type)
    return "ok"


def _attempt(do: Callable[[], Any], seconds: int = _SECONDS) -> Any:
    """What `do` returns, or a line about its failure; one that takes too long is a failure."""

    def too_slow(*_: Any) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(seconds)
    try:
        return do()
    except ValueError as error:
        return f"refused: {str(error)[:300]}"
    except Exception as error:
        return f"fault: {type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)


class _Journey:
    """The steps, in order: each takes what the ones before made."""

    def __init__(self, target: Any, tokenizer: Any) -> None:
        self.target, self.tokenizer = target, tokenizer

    def pairing(self) -> None:
        import torch

        from hf_draftkd import align_vocabulary

        draft = copy.deepcopy(self.target)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in draft.parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(0.05 * noise * (parameter.std() if parameter.numel() > 1 else 0))
        self.draft = align_vocabulary(draft, self.target, self.tokenizer)

    def data(self) -> None:
        from hf_draftkd import generate_alignment_data

        self.rows = generate_alignment_data(
            self.target, self.tokenizer, list(_TEXTS), max_new_tokens=NEW_TOKENS, temperatures=(0.0,), batch_size=2
        )

    def training(self) -> str | None:
        import torch

        before = copy.deepcopy(self.draft.state_dict())
        trained = copy.deepcopy(self.draft)
        self.padded_loss = self._train(trained, learning_rate=1e-2)
        changed = any(not torch.equal(value, before[name]) for name, value in trained.state_dict().items())
        return None if changed and self.padded_loss > 0 else "fault: the step changed nothing"

    def packing(self) -> str | None:
        packed = self._train(copy.deepcopy(self.draft), packing=True)
        if abs(packed - self.padded_loss) <= 1e-4 * self.padded_loss:
            return None
        if self._train(copy.deepcopy(self.draft), seed=1) != self.padded_loss:
            return None  # It draws at random in training, such as experts: no two losses are alike.
        return f"fault: packed loss {packed:.4f}, padded {self.padded_loss:.4f}"

    def _train(self, draft: Any, **options: Any) -> float:
        from hf_draftkd import DraftDistillConfig, DraftDistillTrainer

        with tempfile.TemporaryDirectory() as folder:
            args = DraftDistillConfig(
                output_dir=folder,
                max_steps=1,
                per_device_train_batch_size=4,
                max_length=256,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                **options,
            )
            trainer = DraftDistillTrainer(
                model=draft,
                target_model=self.target,
                args=args,
                train_dataset=self.rows,
                processing_class=self.tokenizer,
            )
            return trainer.train().training_loss

    def evaluation(self) -> str | None:
        from hf_draftkd import count_acceptance, evaluate_draft
        from hf_draftkd.decoding.setting import DecodingSetting
        from hf_draftkd.evaluation.assisted import fixed_draft_length
        from hf_draftkd.evaluation.timing import generate_text, single_text_config

        report = evaluate_draft(
            self.draft, self.target, self.tokenizer, dataset=self.rows, max_new_tokens=NEW_TOKENS, num_speed_prompts=1
        )
        (setting,) = report.settings
        if setting.block_efficiency is None:
            return "refused: " + next(w for w in report.warnings if "could have been written" in w)
        computed = setting.block_efficiency[GAMMA].value
        config = single_text_config(self.target, DecodingSetting(), NEW_TOKENS)
        with fixed_draft_length(self.draft, GAMMA), count_acceptance(self.target) as counts:
            for row in self.rows:
                written, _ = generate_text(self.target, row["prompt_ids"], config, assistant_model=self.draft)
                if written != list(row["completion_ids"]):
                    return "fault: the assisted greedy text is not the plain one"
        counted = counts.mean_acceptance_length
        return None if computed == counted else f"fault: computed {computed}, counted {counted}"

    def decoding(self) -> str | None:
        return self._decoded(1)

    def batches(self) -> str | None:
        return self._decoded(len(self.rows))

    def _decoded(self, batch_size: int) -> str | None:
        from hf_draftkd import SpeculativeDecoding
        from hf_draftkd.decoding.texts import left_padded

        for batch in self.rows.iter(batch_size=batch_size):
            inputs = left_padded(batch["prompt_ids"], self.tokenizer.pad_token_id, self.target.device)
            output = self.target.generate(
                **inputs,
                custom_generate=SpeculativeDecoding(self.draft, GAMMA),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                use_cache=True,  # off in some configs
            )
            written = output[:, inputs["input_ids"].shape[1] :].tolist()
            if any(text[: len(own)] != own for text, own in zip(written, batch["completion_ids"], strict=True)):
                return "fault: a text is not the plain one"
        return None

    def cutting(self) -> str | None:
        import torch

        from hf_draftkd import build_draft

        depth = self.target.config.num_hidden_layers
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            whole = build_draft(self.target, num_layers=depth)
            if not torch.equal(whole(ids).logits, self.target(ids).logits):
                return "fault: all layers are not the target"
            cut = build_draft(self.target, num_layers=2)
            cut.generate(ids, max_new_tokens=4, do_sample=False)
        return None


if __name__ == "__main__":
    main()
