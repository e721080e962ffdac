"""Step 4: distillation from the cached distributions of all three sets. A killed run goes on from its last checkpoint.

python examples/smollm2/train.py --work_dir WORK
python examples/smollm2/train.py --work_dir WORK --model distilled --output parallel --parallel_tokens 4

The second form goes on with a distilled draft and teaches it to propose several tokens in one pass.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import concatenate_datasets
from journey import held_out, read_answers, write_result
from transformers import AutoModelForCausalLM
from trl import TrlParser

from hf_draftkd import DraftDistillConfig, DraftDistillTrainer, load_tokenizer
from hf_draftkd.training.checkpoints import last_complete_checkpoint


@dataclass
class Options:
    """How long, and how fast."""

    work_dir: str = field(default="smollm2", metadata={"help": "Folder of the whole journey: weights, data, results."})
    model: str = field(default="draft", metadata={"help": "Folder in --work_dir of the draft to start from."})
    output: str = field(default="distilled", metadata={"help": "Folder in --work_dir of the draft that comes out."})
    sets: list[str] = field(default_factory=lambda: ["seeds", "synthetic"], metadata={"help": "Besides the domain."})
    epochs: float = field(default=6.0, metadata={"help": "Passes over all sets."})
    batch_size: int = field(default=16, metadata={"help": "Rows of a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate; it falls to 0 as a cosine."})
    seed: int = field(default=42, metadata={"help": "Of the order of the rows."})
    # Forward KL where the draft is far from the target, and nearer to it ever more the acceptance rate itself.
    divergence: str = field(default="lk_hybrid", metadata={"help": "Of the draft from the target."})
    parallel_tokens: int = field(default=1, metadata={"help": "Tokens that the draft learns to predict in one pass."})
    parallel_weights: str = field(default="confidence", metadata={"help": "How its depths count: or uniform."})
    mask_token: str = field(default="<gh_stars>", metadata={"help": "Of a parallel draft; in no text here."})
    held_out: int = field(default=128, metadata={"help": "Last rows of the domain, which are not learned from."})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16, or float32 for older CPUs."})
    save_steps: int = field(default=100, metadata={"help": "Steps between checkpoints; a killed run loses as many."})


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    if options.dtype == "bfloat16":
        # So do the layers (`bf16=True`); this lets the CPU multiply float32 matrices in it too.
        torch.set_float32_matmul_precision("medium")
    work = Path(options.work_dir)
    folder = work / options.output
    if (work / "results" / f"{options.output}.json").exists():
        print(f"{folder} is trained already")
        return
    learned, unseen = held_out(read_answers(work, "gsm8k"), options.held_out)
    rows = concatenate_datasets([learned, *(read_answers(work, name) for name in options.sets)])
    args = DraftDistillConfig(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=32,
        train_sampling_strategy="group_by_length",
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.04,  # of all steps
        divergence=options.divergence,
        draft_vocabulary="recorded",
        parallel_tokens=options.parallel_tokens,
        parallel_weights="uniform" if options.parallel_tokens == 1 else options.parallel_weights,
        seed=options.seed,
        eval_strategy="steps",
        eval_steps=4 * options.save_steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=1,
        logging_steps=20,
        report_to="none",
        use_cpu=True,
        bf16=options.dtype == "bfloat16",
    )
    draft = AutoModelForCausalLM.from_pretrained(work / options.model, dtype="float32")
    tokenizer = load_tokenizer(str(work / "target"))
    if options.parallel_tokens > 1:
        # This vocabulary has no row to spare, but tokens of the code that the target was pretrained on.
        ids = tokenizer.get_vocab()
        if options.mask_token not in ids:
            raise SystemExit(f"The vocabulary has no {options.mask_token!r}: give another --mask_token.")
        draft.config.pard_token = ids[options.mask_token]
    trainer = DraftDistillTrainer(
        model=draft,
        args=args,
        train_dataset=rows,
        eval_dataset=unseen,
        processing_class=tokenizer,
    )
    begun = last_complete_checkpoint(folder)[0]
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=begun)
    seconds = time.perf_counter() - start
    trainer.save_model()
    write_result(
        work,
        options.output,
        {"rows": len(rows), "resumed_from": begun and Path(begun).name, "seconds": seconds}
        | {"log": trainer.state.log_history},
    )


if __name__ == "__main__":
    main()
