"""Distil draft models that agree with their target, and measure honestly what speculative decoding gains.

The names below are imported on first use, so that `import hf_draftkd` costs nothing: neither torch nor transformers
is loaded before one of them is touched.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES = {
    "DraftDistillConfig": "hf_draftkd.training.config",
    "DraftDistillTrainer": "hf_draftkd.training.trainer",
    "AcceptanceCallback": "hf_draftkd.training.callbacks",
    "OnlineDistillConfig": "hf_draftkd.online.config",
    "OnlineDraftDistiller": "hf_draftkd.online.distiller",
    "SpeculativeDecoding": "hf_draftkd.decoding.speculative",
    "build_draft": "hf_draftkd.models.building",
    "extract_text_model": "hf_draftkd.models.loading",
    "align_vocabulary": "hf_draftkd.models.pairing",
    "load_target": "hf_draftkd.models.loading",
    "load_draft": "hf_draftkd.models.loading",
    "AlignmentDataConfig": "hf_draftkd.data.config",
    "load_tokenizer": "hf_draftkd.models.loading",
    "load_prompts": "hf_draftkd.data.prompts",
    "generate_alignment_data": "hf_draftkd.data.generation",
    "choose_draft_vocabulary": "hf_draftkd.data.vocabulary",
    "synthesize_prompts": "hf_draftkd.data.synthesis",
    "cache_target_distributions": "hf_draftkd.data.target_cache",
    "EvaluationConfig": "hf_draftkd.evaluation.config",
    "evaluate_draft": "hf_draftkd.evaluation.evaluate",
    "evaluate_in_engine": "hf_draftkd.evaluation.engines.measure",
    "EngineConfig": "hf_draftkd.evaluation.engines.config",
    "count_acceptance": "hf_draftkd.evaluation.assisted",
    "SpeculationReport": "hf_draftkd.evaluation.report",
    "DraftModelCard": "hf_draftkd.hub.model_card",
    "push_draft": "hf_draftkd.hub.push",
    "find_drafts": "hf_draftkd.hub.find",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from hf_draftkd.data.config import AlignmentDataConfig as AlignmentDataConfig
    from hf_draftkd.data.generation import generate_alignment_data as generate_alignment_data
    from hf_draftkd.data.prompts import load_prompts as load_prompts
    from hf_draftkd.data.synthesis import synthesize_prompts as synthesize_prompts
    from hf_draftkd.data.target_cache import cache_target_distributions as cache_target_distributions
    from hf_draftkd.data.vocabulary import choose_draft_vocabulary as choose_draft_vocabulary
    from hf_draftkd.decoding.speculative import SpeculativeDecoding as SpeculativeDecoding
    from hf_draftkd.evaluation.assisted import count_acceptance as count_acceptance
    from hf_draftkd.evaluation.config import EvaluationConfig as EvaluationConfig
    from hf_draftkd.evaluation.engines.config import EngineConfig as EngineConfig
    from hf_draftkd.evaluation.engines.measure import evaluate_in_engine as evaluate_in_engine
    from hf_draftkd.evaluation.evaluate import evaluate_draft as evaluate_draft
    from hf_draftkd.evaluation.report import SpeculationReport as SpeculationReport
    from hf_draftkd.hub.find import find_drafts as find_drafts
    from hf_draftkd.hub.model_card import DraftModelCard as DraftModelCard
    from hf_draftkd.hub.push import push_draft as push_draft
    from hf_draftkd.models.building import build_draft as build_draft
    from hf_draftkd.models.loading import extract_text_model as extract_text_model
    from hf_draftkd.models.loading import load_draft as load_draft
    from hf_draftkd.models.loading import load_target as load_target
    from hf_draftkd.models.loading import load_tokenizer as load_tokenizer
    from hf_draftkd.models.pairing import align_vocabulary as align_vocabulary
    from hf_draftkd.online.config import OnlineDistillConfig as OnlineDistillConfig
    from hf_draftkd.online.distiller import OnlineDraftDistiller as OnlineDraftDistiller
    from hf_draftkd.training.callbacks import AcceptanceCallback as AcceptanceCallback
    from hf_draftkd.training.config import DraftDistillConfig as DraftDistillConfig
    from hf_draftkd.training.trainer import DraftDistillTrainer as DraftDistillTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
