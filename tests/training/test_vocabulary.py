"""Training a draft that proposes only the tokens of a list."""

import pytest
import torch
from transformers import GenerationConfig

from hf_draftkd import SpeculativeDecoding, cache_target_distributions, choose_draft_vocabulary
from hf_draftkd.models.draft_length import store_draft_settings
from tests.tiny import tiny_pair
from tests.training.rows import alignment_rows
from tests.training.trainers import build


def test_it_learns_on_the_list_alone_and_keeps_it(tmp_path, pair, tokenizer):
    """Catches a loss over all tokens, metrics that SpeculativeDecoding would not confirm, and a list that is lost."""
    draft, target = pair
    rows = alignment_rows(target, tokenizer)
    ids = choose_draft_vocabulary(rows, 12)
    options = {"draft_vocabulary": ids, "eval_num_assistant_tokens": 3, "learning_rate": 3e-3}
    trainer = build(tmp_path, pair, tokenizer, rows, **options)
    before = trainer.model.lm_head.weight.detach().clone()
    found = trainer.evaluate(rows)
    decoding = SpeculativeDecoding(draft, 3, draft_vocabulary=ids)
    accepted = 0.0
    for row in rows:
        prompt = torch.tensor([row["prompt_ids"]])
        target.generate(prompt, max_new_tokens=12, do_sample=False, custom_generate=decoding)
        ids_of_row = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            q, p = (model(ids_of_row).logits[0, prompt.shape[1] - 1 : -1].double() for model in (draft, target))
        outside = torch.ones(q.shape[-1], dtype=torch.bool).index_fill(0, torch.tensor(ids), False)
        q = q.masked_fill(outside, -torch.inf).softmax(-1)
        accepted += float(torch.minimum(q, p.softmax(-1)).sum())
    num_tokens = sum(len(row["completion_ids"]) for row in rows)
    assert found["eval_block_efficiency"] == decoding.counts.mean_acceptance_length
    assert found["eval_acceptance_rate"] == pytest.approx(accepted / num_tokens, abs=1e-5)

    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < found["eval_loss"]
    moved = (trainer.model.lm_head.weight.detach() != before).any(-1).nonzero()[:, 0].tolist()
    assert set(moved) == set(ids)
    trainer.save_model(str(tmp_path / "saved"))
    assert GenerationConfig.from_pretrained(tmp_path / "saved").draft_vocabulary == ids


def test_cached_distributions_give_the_same_as_the_target(tmp_path, tokenizer):
    rows = alignment_rows(tiny_pair()[1], tokenizer, count=4)
    ids = choose_draft_vocabulary(rows, 12)
    losses = []
    for is_cached in (False, True):
        draft, target = tiny_pair()
        store_draft_settings(draft, {"draft_vocabulary": ids})
        data = rows
        if is_cached:
            data = cache_target_distributions(rows, target, top_k=target.config.vocab_size)
        given = (draft, None if is_cached else target)
        trainer = build(tmp_path, given, tokenizer, eval_rows=data, draft_vocabulary="recorded", divergence="lk_hybrid")
        metrics = trainer.evaluate()
        losses.append((metrics["eval_loss"], metrics["eval_acceptance_rate"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_draft_writes_tokens_of_the_list_only(tmp_path, pair, tokenizer):
    """On-policy text of tokens that it never proposes would teach it what it is not asked."""
    rows = alignment_rows(pair[1], tokenizer)
    ids = choose_draft_vocabulary(rows, 12)
    trainer = build(tmp_path, pair, tokenizer, rows, lmbda=1.0, max_new_tokens=8, draft_vocabulary=ids)
    seen = []
    collator = trainer.data_collator
    trainer.data_collator = lambda examples: seen.extend(examples) or collator(examples)
    trainer.train()
    written = {token for row in seen if isinstance(row["labels"], list) for token in row["labels"] if token != -100}
    outside = [row for row in seen if set(row["labels"]) - {-100} <= set(ids)]
    assert written
    assert len(outside) >= len(seen) // 2, "every row that was rewritten"


@pytest.mark.parametrize(
    ("value", "message"), [("recorded", "holds none"), ([5, 100_000], "got \\[100000\\]"), ("record", "recorded")]
)
def test_a_list_that_is_none_is_refused(tmp_path, pair, tokenizer, value, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, pair, tokenizer, draft_vocabulary=value)
