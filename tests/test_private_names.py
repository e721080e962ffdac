"""Every private name of another library that the package relies on, in one list, checked against what is installed.

A release of such a library may rename any of them without notice. They were checked with the lower bounds of
`dependencies` in `pyproject.toml` (transformers 5.23, trl 1.16, datasets 5.2, torch 2.13), and are relied on up to the
next major versions (`transformers<6`, `trl<2`). Raise a bound once these tests pass with it.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from trl import SFTTrainer

import hf_draftkd
from hf_draftkd import DraftDistillTrainer

# Where each stands -> why we need it.
PRIVATE_NAMES = {
    # Overridden in DraftDistillTrainer: nothing public stands in the same place. At most four methods.
    "trl.SFTTrainer._prepare_dataset": "exact ids, mixed formats and cached distributions, before rows are tokenised",
    "transformers.Trainer._get_dataloader": "evaluation one text a row; a stream ends alike on all processes",
    "transformers.Trainer._save": "adapters merged into a plain draft; no token in `training_args.bin`",
    "transformers.Trainer._init_training_state": "where in a stream that is read again a run resumes",
    "trl.SFTTrainer._tag_names": "tags that `draft.push_to_hub()` puts on a card",
    # Read, called or set by DraftDistillTrainer.
    "transformers.Trainer._get_num_items_in_batch": "completion tokens of batches whose completions were rewritten",
    "transformers.Trainer._prepare_inputs": "an own `prediction_step` has to place its batch",
    "transformers.Trainer._loss_shifts_labels": "completion tokens are counted as the loss counts them",
    "trl.SFTTrainer._set_signature_columns_if_needed": "columns that batches keep: ours are two more",
    "transformers.Trainer._signature_columns": "the same",
    "trl.SFTTrainer._formatting_func": "what reads data that is given to `evaluate` or `predict`",
    "accelerate.Accelerator._is_accelerate_prepared": "a draft that was evaluated first would never be wrapped in DDP",
    "transformers.TrainingArguments._VALID_DICT_FIELDS": "`target_model_init_kwargs` as JSON on the command line",
    # Of models and data sets.
    "transformers.generation.GenerationMixin._supports_logits_to_keep": "whether it can be asked for some logits only",
    "transformers.PreTrainedConfig._attn_implementation": "a built draft attends as its target does",
    "transformers.PreTrainedConfig._name_or_path": "the id that a config came from",
    "transformers.GenerationConfig._get_default_generation_params": "what `generate` fills in where a config is silent",
    "transformers.generation.GenerationMixin._prepare_generation_config": "the setting that a request is decoded under",
    "transformers.PreTrainedModel._is_stateful": "models whose cache cannot give tokens back",
    "transformers.generation.GenerationMixin._supports_default_dynamic_cache": "models with a cache of their own",
    "transformers.GenerationConfig._mask_length": "how long the mask is that `generate` has made",
    "transformers.GenerationConfig._from_model_config": "whether a config keeps keys that transformers does not know",
    "transformers.GenerationConfig._pad_token_tensor": "the padding id that `generate` has settled on",
    "datasets.Dataset._fingerprint": "the name of cached results",
    "torch.nn.Module._forward_hooks": "whether anything listens to a model's head",
    "torch.nn.Module._modules": "a twin of a draft that shares all its layers but one",
    "torch._dynamo": "how many shapes of one forward may be compiled",
    # Of Python itself.
    "sys._getframe": "what `generate` hands to no callable, read where it called",
    "argparse.ArgumentParser._option_string_actions": "every option with its spelling, for suggestions",
}
# Of named tuples, documented; and what the package itself hangs on a model.
EXEMPT = {"_replace", "_draftkd_observer"}
NAMES = {where.rpartition(".")[2] for where in PRIVATE_NAMES}
PACKAGE = Path(hf_draftkd.__file__).parent


def modules() -> Iterator[ast.Module]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_here() -> set[str]:
    """Names that the package itself gives to functions, classes, variables and attributes."""
    found = set()
    for module in modules():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.add(node.attr)
    return found


def from_elsewhere() -> set[str]:
    """Private names that the package imports from other libraries, or reads of objects that are not its own."""
    own, found = defined_here(), set()
    for module in modules():
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                found.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("hf_draftkd"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                found |= {name for name in names if is_private(name)}
    return found - EXEMPT


def of_its_bases(names: set[str]) -> set[str]:
    """Those of the private `names` that SFTTrainer, or what it extends, has as well."""
    sources = "".join(inspect.getsource(base) for base in SFTTrainer.__mro__[:-1])
    return {name for name in names if is_private(name) and (hasattr(SFTTrainer, name) or f"self.{name} " in sources)}


def overrides() -> set[str]:
    return of_its_bases(set(vars(DraftDistillTrainer)))


def of_the_trainer() -> set[str]:
    """What DraftDistillTrainer overrides, reads or sets of its bases."""
    tree = ast.parse(inspect.getsource(DraftDistillTrainer))
    return overrides() | of_its_bases({node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)})


@pytest.mark.parametrize("where", PRIVATE_NAMES)
def test_each_private_name_exists_in_the_installed_version(where):
    """A release that renames one: found here, and not in the middle of a user's run."""
    owner, _, name = where.rpartition(".")
    try:
        thing = importlib.import_module(owner)
    except ImportError:
        module, _, kind = owner.rpartition(".")
        thing = getattr(importlib.import_module(module), kind)
    # Attributes of instances show in the source alone.
    assert hasattr(thing, name) or name in inspect.getsource(thing)


def test_no_private_name_is_missing_in_the_list_or_listed_in_vain():
    """One more thing that the next release may break, unseen."""
    used = from_elsewhere() | of_the_trainer()
    assert used <= NAMES, f"not in the list: {sorted(used - NAMES)}"
    # Set on the configuration class, which has it from its base.
    assert NAMES - used <= {"_VALID_DICT_FIELDS"}, f"no longer used: {sorted(NAMES - used)}"


def test_the_trainer_extends_one_class_and_overrides_few_private_methods():
    assert DraftDistillTrainer.__bases__ == (SFTTrainer,)
    assert len([name for name in overrides() if callable(getattr(SFTTrainer, name))]) <= 4
