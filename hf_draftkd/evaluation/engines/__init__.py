"""Engines that serve a pair: each is asked for the same completions, plainly and with the draft, and what it counts."""

from hf_draftkd.evaluation.engines.llama_cpp import LlamaCpp
from hf_draftkd.evaluation.engines.open_vino import OpenVINO
from hf_draftkd.evaluation.engines.protocol import Engine
from hf_draftkd.evaluation.engines.vllm import VLLM

ENGINES: dict[str, Engine] = {"llama.cpp": LlamaCpp(), "vllm": VLLM(), "openvino": OpenVINO()}
