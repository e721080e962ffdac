"""A custom loss: override one method. Here: squared Hellinger distance, H²(p, q) = 1 − Σ √(p·q).

python examples/custom_divergence.py [--max_steps 30]
"""

from trl import TrlParser

from hf_draftkd import DraftDistillConfig, DraftDistillTrainer, generate_alignment_data, load_draft, load_target
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_tokenizer


class HellingerTrainer(DraftDistillTrainer):
    def token_loss(self, draft_logits, target_logits):
        log_q, log_p = draft_logits.log_softmax(-1), target_logits.log_softmax(-1)
        return 1 - (0.5 * (log_p + log_q)).exp().sum(-1)


(args,) = TrlParser(DraftDistillConfig).parse_args_and_config()
args.report_to, args.save_strategy = [], "no"
target = load_target(demo_path("target"), dtype="float32")
tokenizer = load_tokenizer(demo_path("target"))
prompts = load_prompts(demo_path("train.jsonl"), limit=128)
answers = generate_alignment_data(target, tokenizer, prompts, max_new_tokens=96, batch_size=32)
answers = answers.train_test_split(0.25, seed=args.seed)
trainer = HellingerTrainer(
    model=load_draft(demo_path("draft"), dtype="float32"),
    target_model=target,
    args=args,
    train_dataset=answers["train"],
    eval_dataset=answers["test"],
    processing_class=tokenizer,
)
before = trainer.evaluate()["eval_block_efficiency"]
trainer.train()
print(f"Tokens per target call: {before:.2f} before, {trainer.evaluate()['eval_block_efficiency']:.2f} after.")
