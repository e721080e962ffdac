"""Real functions of the standard library, read from its source: name, parameters and what the docstring says first."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from demo_pair.corpus import DEV_MODULES, TEST_MODULES, source_files

MAX_PARAMETERS = 5
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Parameter:
    """A parameter as the signature states it; `default` is None where an argument is required."""

    name: str
    default: str | None


@dataclass(frozen=True)
class Function:
    """One documented function or method: `sentence` opens its docstring, without the full stop.

    `name` is the bare one, as APIs for function calling want it: they allow no dots. `module` is the top-level one.
    """

    module: str
    name: str
    parameters: tuple[Parameter, ...]
    sentence: str

    @property
    def listing(self) -> str:
        """The function as a query lists it: what it does, then how it is called.

        In this order a causal model knows by the name whether the description answers the request. The signature has
        no spaces, since a word after a space is another token than the same word in the answer's JSON: a small model
        copies tokens, it does not spell.
        """
        parts = (p.name if p.default is None else f"{p.name}={p.default}" for p in self.parameters)
        return f"# {uncapitalised(self.sentence)}\n{self.name}({','.join(parts)})"


def uncapitalised(sentence: str) -> str:
    """The sentence as it reads inside another one; acronyms stay."""
    return sentence if sentence[:2].isupper() else sentence[0].lower() + sentence[1:]


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring on one line, or None where it would not do as a request."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z)])\.(?:\s|$)|[:;](?:\s|$)", paragraph)[0].strip(" .")
    plain = re.fullmatch(r"[A-Za-z0-9 ,'()/_-]+", sentence)
    return sentence if plain and 4 <= len(sentence.split()) <= 18 and sentence[0].isupper() else None


def _parameters(node: ast.FunctionDef, *, method: bool) -> tuple[Parameter, ...] | None:
    """Named parameters of a definition, or None where it takes none, too many, or any number of them."""
    arguments = node.args
    if arguments.vararg or arguments.kwarg:
        return None
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = list(zip(positional, defaults, strict=True))[1 if method and not static else 0 :]
    pairs += list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    texts = [(argument.arg, None if default is None else ast.unparse(default)) for argument, default in pairs]
    shown = tuple(Parameter(name, text and (text if len(text) <= 6 else "...")) for name, text in texts)
    public = all(not p.name.startswith("_") for p in shown)
    return shown if public and 1 <= len(shown) <= MAX_PARAMETERS else None


def _definitions(body: list[ast.stmt], module: str, *, method: bool) -> Iterator[Function]:
    """Public documented functions and methods in a module's or class's body."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not method:
            yield from _definitions(node.body, module, method=True)
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        known = {"staticmethod", "classmethod"}
        if any(not (isinstance(d, ast.Name) and d.id in known) for d in node.decorator_list):
            continue  # properties, overloads and wrappers are called otherwise than they are written
        docstring = ast.get_docstring(node)
        sentence = first_sentence(docstring) if docstring else None
        parameters = _parameters(node, method=method)
        if sentence and parameters:
            yield Function(module, node.name, parameters, sentence)


@cache
def functions_by_split() -> dict[str, list[Function]]:
    """Functions for training, development and test queries.

    The splits share no module, no function name (`copy.copy` yields to `shutil.copy`) and no opening sentence.
    """
    found: dict[str, list[Function]] = {split: [] for split in SPLITS}
    for module, path in source_files():
        if any(part.startswith("_") for part in module.split(".")):
            continue
        package = module.split(".")[0]
        split = "test" if package in TEST_MODULES else "dev" if package in DEV_MODULES else "train"
        tree = ast.parse(path.read_bytes())
        found[split] += _definitions(tree.body, package, method=False)
    names: set[str] = set()
    sentences: set[str] = set()
    kept: dict[str, list[Function]] = {split: [] for split in SPLITS}
    for split in reversed(SPLITS):  # the splits that measure choose first
        taken = frozenset(names)
        for function in found[split]:
            sentence = function.sentence.lower()
            if function.name not in taken and sentence not in sentences:
                kept[split].append(function)
                names.add(function.name)
                sentences.add(sentence)
    return kept
