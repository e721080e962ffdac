"""Parts of `examples/pretrain_demo_pair.py`: text, tokenizer, training loops, queries and metrics of the demo pair."""
