"""The papers behind a draft: those of the methods that were used, and no others."""

from collections.abc import Mapping
from typing import Any

from hf_draftkd.hub.provenance import TrainingSummary

# Key -> (title, authors, year, arXiv number).
PAPERS: dict[str, tuple[str, str, int, str]] = {
    "leviathan2023": (
        "Fast Inference from Transformers via Speculative Decoding",
        "Leviathan, Yaniv and Kalman, Matan and Matias, Yossi",
        2023,
        "2211.17192",
    ),
    "chen2023": (
        "Accelerating Large Language Model Decoding with Speculative Sampling",
        "Chen, Charlie and Borgeaud, Sebastian and Irving, Geoffrey and Lespiau, Jean-Baptiste and Sifre, Laurent "
        "and Jumper, John",
        2023,
        "2302.01318",
    ),
    "hong2025": (
        "Training Domain Draft Models for Speculative Decoding: Best Practices and Insights",
        "Hong, Fenglu and Raju, Ravi and Li, Jonathan Lingjie and Li, Bo and Thakker, Urmish and Ravichandran, Avinash "
        "and Jain, Swayambhoo and Hu, Changran",
        2025,
        "2503.07807",
    ),
    "zhou2024": (
        "DistillSpec: Improving Speculative Decoding via Knowledge Distillation",
        "Zhou, Yongchao and Lyu, Kaifeng and Rawat, Ankit Singh and Menon, Aditya Krishna and Rostamizadeh, Afshin "
        "and Kumar, Sanjiv and Kagy, Jean-François and Agarwal, Rishabh",
        2024,
        "2310.08461",
    ),
    "goel2024": (
        "Direct Alignment of Draft Model for Speculative Decoding with Chat-Fine-Tuned LLMs",
        "Goel, Raghavv and Gagrani, Mukul and Jeon, Wonseok and Park, Junyoung and Lee, Mingu and Lott, Christopher",
        2024,
        "2403.00858",
    ),
    "hu2025": (
        "AdaSPEC: Selective Knowledge Distillation for Efficient Speculative Decoders",
        "Hu, Yuezhou and Guo, Jiaxin and Feng, Xinyu and Zhao, Tuo",
        2025,
        "2510.19779",
    ),
    "samarin2026": (
        "LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding",
        "Samarin, Alexander and Krutikov, Sergei and Shevtsov, Anton and Skvortsov, Sergei and Fisin, Filipp "
        "and Golubev, Alexander",
        2026,
        "2602.23881",
    ),
    "xu2024": (
        "Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with Nothing",
        "Xu, Zhangchen and Jiang, Fengqing and Niu, Luyao and Deng, Yuntian and Poovendran, Radha and Choi, Yejin "
        "and Lin, Bill Yuchen",
        2024,
        "2406.08464",
    ),
    "liu2023": (
        "Online Speculative Decoding",
        "Liu, Xiaoxuan and Hu, Lanxiang and Bailis, Peter and Cheung, Alvin and Deng, Zhijie and Stoica, Ion "
        "and Zhang, Hao",
        2023,
        "2310.07177",
    ),
    "kim2016": (
        "Sequence-Level Knowledge Distillation",
        "Kim, Yoon and Rush, Alexander M.",
        2016,
        "1606.07947",
    ),
    "lin2020": (
        "Autoregressive Knowledge Distillation through Imitation Learning",
        "Lin, Alexander and Wohlwend, Jeremy and Chen, Howard and Lei, Tao",
        2020,
        "2009.07253",
    ),
    "wen2023": (
        "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
        "Wen, Yuqiao and Li, Zichao and Du, Wenyu and Mou, Lili",
        2023,
        "2307.15190",
    ),
    "agarwal2024": (
        "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        "Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos, Sabela "
        "and Geist, Matthieu and Bachem, Olivier",
        2024,
        "2306.13649",
    ),
    "xu2025": (
        "Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved Sampling",
        "Xu, Wenda and Han, Rujun and Wang, Zifeng and Le, Long T. and Madeka, Dhruv and Li, Lei "
        "and Wang, William Yang and Agarwal, Rishabh and Lee, Chen-Yu and Pfister, Tomas",
        2025,
        "2410.11325",
    ),
    "anshumann2025": (
        "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
        "Anshumann and others",
        2025,
        "2503.16870",
    ),
}


def papers_used(training: TrainingSummary | None, report: Mapping[str, Any] | None = None) -> list[str]:
    """Keys of `PAPERS` for the methods of a training, in order and without repetition.

    Args:
        training: What was done; None gives the papers of speculative decoding alone.
        report: A report whose figures are quoted brings the papers that define them.
    """
    used = ["leviathan2023", "chen2023"]
    if training is not None:
        used.append("hong2025")
        if training.completions in ("draft", "mixed", "data_and_draft") or training.divergence not in (
            None,
            "cross_entropy",
        ):
            used.append("zhou2024")
        used += _writing_papers(training)
        if (training.hyperparameters or {}).get("token_selection") == "adaspec":
            used.append("hu2025")
        if training.divergence == "tvd_plus_plus":
            used.append("goel2024")
        if training.divergence in ("negative_log_acceptance", "lk_hybrid"):
            used.append("samarin2026")
        if "synthetic" in (training.scenarios or ()):
            used.append("xu2024")
        if training.online:
            used.append("liu2023")
        if training.signal == "cached":
            used.append("anshumann2025")
    if report is not None and any("mbsu" in setting for setting in report.get("settings", ())):
        used.append("goel2024")
    return list(dict.fromkeys(used))


def _writing_papers(training: TrainingSummary) -> list[str]:
    """Those that wrote completions while training as this one did."""
    used = []
    if training.completions == "target" and (training.hyperparameters or {}).get("seq_kd"):
        used.append("kim2016")
    if training.completions == "data_and_draft" and training.divergence == "forward_kl":
        used.append("lin2020")
    if training.completions == "mixed" and training.divergence == "total_variation":
        used.append("wen2023")
    if training.lmbda:
        used.append("agarwal2024")
    if training.skd_top_k is not None:
        used.append("xu2025")
    return used


def bibtex(key: str) -> str:
    """One BibTeX entry."""
    title, authors, year, arxiv = PAPERS[key]
    return (
        f"@misc{{{key},\n"
        f"  title         = {{{{{title}}}}},\n"
        f"  author        = {{{authors}}},\n"
        f"  year          = {{{year}}},\n"
        f"  eprint        = {{{arxiv}}},\n"
        f"  archivePrefix = {{arXiv}},\n"
        f"  url           = {{https://arxiv.org/abs/{arxiv}}}\n"
        f"}}"
    )
