"""Prompts in, alignment data out."""
