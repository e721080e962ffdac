"""Acceptance and block efficiency as an `evaluate` metric: `evaluate.load("…/hf_draftkd/evaluation/metric")`."""
