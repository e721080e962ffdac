"""Make the demo pair of `hf_draftkd/assets/demo` from the running interpreter's own standard library.

    python examples/pretrain_demo_pair.py                     # everything: about an hour on two CPU cores
    python examples/pretrain_demo_pair.py --stage target      # one stage, from what the earlier ones left
    python examples/pretrain_demo_pair.py --smoke             # all stages at toy size, under a minute

The stages are corpus, base, target, draft and evaluate. Each leaves its result in `--work_dir`; base and draft resume
from their last checkpoint when interrupted. `evaluate` writes the shipped files to `--assets_dir`. `--smoke` uses
separate directories unless told otherwise, so it never touches the real ones.
"""

import argparse
import hashlib
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from demo_pair import corpus, evaluation
from demo_pair.card import render_card
from demo_pair.chat_tuning import TuningPass, chat_tune, warm_up
from demo_pair.copying import WarmUp
from demo_pair.functions import functions_by_split
from demo_pair.pretraining import Schedule, base_config, pretrain
from demo_pair.queries import make_queries, usable
from demo_pair.tokenizer import VOCABULARY_SIZE, encode_documents, train_tokenizer
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parent.parent
# What the tokenizer remembers of how it was loaded here, of no concern to whoever loads it next.
LOADING_NOTES = ("is_local", "local_files_only")
STAGES = ("corpus", "base", "target", "draft", "evaluate")
SEEDS = {"base": 1, "draft": 2, "target": 3, "warm_up": 4, "chat_queries": 11, "dev": 12, "test": 13, "train": 14}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    base: Schedule
    draft: Schedule
    warm_up: WarmUp
    tuning: TuningPass
    queries: tuple[tuple[str, int], ...]
    documents: int | None = None
    vocabulary: int = VOCABULARY_SIZE
    smoke: bool = False


FULL = Plan(
    base=Schedule(steps=600),
    draft=Schedule(steps=600),
    warm_up=WarmUp(steps=300),
    tuning=TuningPass(9600, distractor_counts=(1, 2, 2, 3), disguise_share=0.5),
    queries=(("train", 2400), ("dev", 200), ("test", 200)),
)
_TOY = Schedule(
    steps=6,
    tokens_per_step=1024,
    tokens_per_micro_batch=512,
    sequence_length=64,
    long_sequence_length=128,
    warmup_steps=2,
)
SMOKE = Plan(
    base=_TOY,
    draft=_TOY,
    warm_up=WarmUp(steps=3, choices=6, repetitions=2, warmup_steps=2),
    tuning=TuningPass(16, distractor_counts=(1, 2), disguise_share=0.5, warmup_steps=1, batch_size=8),
    documents=2,
    vocabulary=512,
    queries=(("train", 24), ("dev", 8), ("test", 8)),
    smoke=True,
)


class Workshop:
    """The stages of a run, over the files they leave for each other in `work`."""

    def __init__(self, plan: Plan, work: Path, assets: Path) -> None:
        self.plan, self.work, self.assets = plan, work, assets
        work.mkdir(parents=True, exist_ok=True)
        (work / ".gitignore").write_text("*\n")  # checkpoints are large and of this machine only

    def _note(self, stage: str, figures: dict[str, Any]) -> None:
        (self.work / f"{stage}.json").write_text(json.dumps(figures, indent=2))

    def _noted(self, stage: str) -> dict[str, Any]:
        path = self.work / f"{stage}.json"
        if not path.exists():
            raise SystemExit(f"The stage {stage!r} has left nothing in {self.work}: run it first, or use --stage all.")
        return json.loads(path.read_text())

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        self._noted("corpus")
        return PreTrainedTokenizerFast.from_pretrained(self.work / "tokenizer")

    def corpus(self) -> None:
        """Text, tokenizer, token streams and the shipped queries."""
        documents = corpus.training_documents()[: self.plan.documents]
        held_out = corpus.source_documents(held_out=True)[: self.plan.documents]
        tokenizer = train_tokenizer(documents, self.plan.vocabulary)
        tokenizer.save_pretrained(self.work / "tokenizer")
        streams = {"train": encode_documents(tokenizer, documents), "held_out": encode_documents(tokenizer, held_out)}
        for name, stream in streams.items():
            np.save(self.work / f"{name}.npy", stream)
        functions = functions_by_split()
        for split, count in self.plan.queries:
            rows = (query.row() for query in make_queries(functions[split], count, SEEDS[split]))
            (self.work / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        figures = {
            "vocabulary": len(tokenizer),
            "train_tokens": len(streams["train"]),
            "held_out_tokens": len(streams["held_out"]),
            "held_out_bytes": sum(len(text.encode()) for text in held_out),
            "functions": {split: len(usable(found)) for split, found in functions.items()},
            "queries": dict(self.plan.queries),
            "dev_modules": corpus.DEV_MODULES,
            "test_modules": corpus.TEST_MODULES,
        }
        self._note("corpus", figures)

    def _pretrain(self, stage: str, schedule: Schedule) -> None:
        tokenizer = self._tokenizer()
        config = base_config(tokenizer, draft=stage == "draft", smoke=self.plan.smoke)
        train, held_out = (np.load(self.work / f"{name}.npy") for name in ("train", "held_out"))
        model, figures = pretrain(config, train, held_out, schedule, self.work / stage, seed=SEEDS[stage])
        model.save_pretrained(self.work / stage / "model")
        self._note(stage, figures)

    def base(self) -> None:
        """The base model, on the general text."""
        self._pretrain("base", self.plan.base)

    def draft(self) -> None:
        """The stock draft, on the same text."""
        self._pretrain("draft", self.plan.draft)

    def target(self) -> None:
        """The target: the base model, taught to copy and then tuned on conversations about the training functions."""
        tokenizer = self._tokenizer()
        self._noted("base")
        model = load(self.work / "base" / "model")
        figures = {"warm_up": warm_up(model, tokenizer, self.plan.warm_up, seed=SEEDS["warm_up"])}
        queries = make_queries(
            functions_by_split()["train"],
            self.plan.tuning.conversations,
            SEEDS["chat_queries"],
            disguise_share=self.plan.tuning.disguise_share,
            distractor_counts=self.plan.tuning.distractor_counts,
        )
        figures["tuning"] = chat_tune(model, tokenizer, queries, self.plan.tuning, seed=SEEDS["target"])
        model.save_pretrained(self.work / "target" / "model")
        self._note("target", figures)

    def evaluate(self) -> None:
        """Write the assets, then measure exactly what was written."""
        tokenizer = self._tokenizer()
        stages = {stage: self._noted(stage) for stage in STAGES[:-1]}
        for name in ("target", "draft"):
            ship(load(self.work / name / "model"), tokenizer, self.assets / name)
        for split, _ in self.plan.queries:
            (self.assets / f"{split}.jsonl").write_bytes((self.work / f"{split}.jsonl").read_bytes())
        target, draft = load(self.assets / "target"), load(self.assets / "draft")
        stream, num_bytes = np.load(self.work / "held_out.npy"), stages["corpus"]["held_out_bytes"]
        models = {"base": load(self.work / "base" / "model"), "target": target, "draft": draft}
        calls, written = {}, []
        for split in ("dev", "test"):
            rows = evaluation.read_rows(str(self.assets / f"{split}.jsonl"))
            written = evaluation.answers(target, tokenizer, rows)
            calls[split] = evaluation.call_figures(tokenizer, rows, written)
        figures = {
            "held_out": {name: evaluation.text_figures(model, stream, num_bytes) for name, model in models.items()},
            "calls": calls,
            "stock_acceptance_rate": evaluation.acceptance_rate(target, draft, written),
        }
        provenance = {
            "command": "python examples/pretrain_demo_pair.py" + (" --smoke" if self.plan.smoke else ""),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "hardware": f"{cpu_model()}, {torch.get_num_threads()} threads",
            "seeds": SEEDS,
            "stages": stages,
            "target": described(target, self.assets / "target"),
            "draft": described(draft, self.assets / "draft"),
            "figures": figures,
        }
        (self.assets / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        (self.assets / "README.md").write_text(render_card(provenance))
        print(json.dumps(figures, indent=2))


def load(directory: Path) -> LlamaForCausalLM:
    """A saved model in float32, whatever it is stored in, with the attention that is fastest here."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def ship(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save model, tokenizer and generation settings as a user finds them: bfloat16, greedy, no sampling defaults."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = directory / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(settings.read_text()).items() if key not in LOADING_NOTES}
    settings.write_text(json.dumps(kept, indent=2) + "\n")


def described(model: LlamaForCausalLM, directory: Path) -> dict[str, Any]:
    """Size of a shipped model and the checksum of its weights."""
    return {
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
    }


def cpu_model() -> str:
    """The processor's name, where the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all", help="which stage to run (default: all)")
    parser.add_argument("--work_dir", type=Path, help="where the stages leave their results (default: demo_pair_work)")
    parser.add_argument("--assets_dir", type=Path, help="where the pair goes (default: hf_draftkd/assets/demo)")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    work = options.work_dir or REPOSITORY / ("demo_pair_smoke" if options.smoke else "demo_pair_work")
    real_assets = REPOSITORY / "hf_draftkd" / "assets" / "demo"
    assets = options.assets_dir or (work / "assets" if options.smoke else real_assets)
    if options.smoke and assets.resolve() == real_assets.resolve():
        sys.exit(f"--smoke would replace the real pair in {assets}: give another --assets_dir.")
    workshop = Workshop(SMOKE if options.smoke else FULL, work, assets)
    for stage in STAGES if options.stage == "all" else (options.stage,):
        print(f"== {stage}", flush=True)
        getattr(workshop, stage)()


if __name__ == "__main__":
    main()
