"""What works with which architecture: a table over the causal LMs of the installed transformers.

    python examples/benchmarks/architectures.py [--output architectures.jsonl] [--only qwen3 gemma3_text] [--jobs 1]

A tiny model of every architecture (random weights, made from its config class) goes through the whole journey with a
draft that agrees in part: pairing, alignment data, a training step, packing, exact evaluation and cutting. Each cell
says ok, or what was refused and why, or what went wrong. Finished architectures lie in `--output` with the versions
they were tried with, and are not tried again.
"""

import argparse
import copy
import json
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resumable import run_all

STEPS = ("pairing", "data", "training", "packing", "evaluation", "cutting")
GAMMA = 5
NEW_TOKENS = 24
_SECONDS = 90
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
    print(table(results))


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as markdown: those that work everywhere in one line, the others one row each."""
    versions = next(iter(results.values()))["versions"]
    works = sorted(name for name, result in results.items() if all(result.get(step) == "ok" for step in STEPS))
    lines = [
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "",
        f"{len(works)} of {len(results)} architectures pass every step: {', '.join(works)}.",
        "",
        "| architecture | " + " | ".join(STEPS) + " |",
        "|---" * (len(STEPS) + 1) + "|",
    ]
    for name, result in sorted(results.items()):
        if name in works:
            continue
        if "model" in result:
            lines.append(f"| {name} | {_cell(result['model'])} |" + " |" * (len(STEPS) - 1))
        else:
            lines.append(f"| {name} | " + " | ".join(_cell(result.get(step, "")) for step in STEPS) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


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
        model = tiny_model(model_type, vocab_size=len(tokenizer))
        for config in (model.config, model.generation_config):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(config, name, getattr(tokenizer, name))
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
        if step in ("training", "packing", "evaluation") and result["data"] != "ok":
            result[step] = "not tried, no data"
            continue
        outcome = _attempt(getattr(journey, step))
        result[step] = outcome if isinstance(outcome, str) else "ok"
    return result


def _check_class(model_type: str) -> str:
    from transformers import CONFIG_MAPPING

    from hf_draftkd.models.resolve import check_config

    check_config(CONFIG_MAPPING[model_type](), model_type)
    return "ok"


def _attempt(do: Callable[[], Any]) -> Any:
    """What `do` returns, or a line about its failure; one that takes too long is a failure."""

    def too_slow(*_: Any) -> None:
        raise TimeoutError(f"not done within {_SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(_SECONDS)
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
        import torch

        from hf_draftkd import count_acceptance, evaluate_draft

        report = evaluate_draft(
            self.draft, self.target, self.tokenizer, dataset=self.rows, max_new_tokens=NEW_TOKENS, measure_speed=False
        )
        computed = json.loads(report.to_json())["settings"][0]["block_efficiency"][str(GAMMA)]["value"]
        config = self.draft.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = GAMMA, "constant"
        config.assistant_confidence_threshold = 0.0
        with count_acceptance(self.target) as counts:
            for row in self.rows:
                prompt = torch.tensor([row["prompt_ids"]])
                written = self.target.generate(
                    prompt, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=self.draft
                )
                if written[0, prompt.shape[1] :].tolist() != list(row["completion_ids"]):
                    return "fault: the assisted greedy text is not the plain one"
        counted = counts.mean_acceptance_length
        return None if computed == counted else f"fault: computed {computed}, counted {counted}"

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
