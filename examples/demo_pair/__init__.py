"""Parts of `examples/pretrain_demo_pair.py`: text, tokenizer, training loops, queries and figures of the demo pair."""
