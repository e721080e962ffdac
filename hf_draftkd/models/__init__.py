"""Two models, and what makes them a pair."""

from hf_draftkd.models.building import build_draft
from hf_draftkd.models.loading import load_draft, load_target, load_tokenizer
from hf_draftkd.models.pairing import align_vocabulary, check_tokenizers, shared_vocab_size
from hf_draftkd.models.resolve import Checkpoint, check_model, resolve
from hf_draftkd.models.tokenizers import tokenizer_fingerprint

__all__ = [
    "Checkpoint",
    "align_vocabulary",
    "build_draft",
    "check_model",
    "check_tokenizers",
    "load_draft",
    "load_target",
    "load_tokenizer",
    "resolve",
    "shared_vocab_size",
    "tokenizer_fingerprint",
]
