"""How far the draft's next-token distribution is from the target's: logits in, per-position values out."""
