"""What the README, the guides and the examples say is run: a page that went stale fails here.

A page's `python` and `bash` blocks belong to one session, from top to bottom, where `org/draft` and `org/target` are
the demo pair, of the target three of its eight layers, with few steps. A block that begins with "# not run in the
tests: why" needs what is not here (a GPU, weights from the Hub, another engine): of it only the names, arguments and
options are checked.
"""

import ast
import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from hf_draftkd import build_draft
from hf_draftkd.cli.main import COMMANDS, dispatch
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_target, load_tokenizer
from tests.cli.run import ROOT

GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
NOTEBOOK = ROOT / "examples" / "distill_a_draft.ipynb"
PAGES = [ROOT / "README.md", *GUIDES, NOTEBOOK]
RESULTS = [ROOT / "examples" / name / "README.md" for name in ("", "configs", "smollm2", "claims")]
NOT_RUN = "# not run in the tests: "
# What stands here for what a page says: runs are cut short.
STAND_INS = {
    'demo_path("target")': '"org/target"',
    'demo_path("draft")': '"org/draft"',
    "test_size=32": "test_size=4",
    "max_new_tokens=96": "max_new_tokens=8",
    "--num_prompts 1000": "--num_prompts 1 --query_max_new_tokens 64",
    "limit=320": "limit=8",
    "limit=48": "limit=4",
    "num_speed_prompts=8": "num_speed_prompts=1, temperatures=[0.0]",
    "DraftDistillConfig(": "DraftDistillConfig(max_steps=2, ",
    'evaluate_draft(draft, target, tokenizer, prompts["test"],': "evaluate_draft(draft, target, tokenizer, "
    'prompts["test"], num_speed_prompts=1, temperatures=[0.0],',
}
# What is added to a command of `draftkd`, where the last of two equal options wins.
SHORT = {
    "generate": "--max_new_tokens 8",
    "train": "--max_steps 2 --report_to none",
    "evaluate": "--max_new_tokens 8 --limit 4 --temperatures 0 --no_measure_speed",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str

    @property
    def is_run(self) -> bool:
        return not self.text.startswith(NOT_RUN)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        # What begins with a percent sign is for the notebook alone.
        sources = [re.sub(r"^( *)%.*", r"\1pass", "".join(cell["source"]), flags=re.MULTILINE) for cell in cells]
        return [Block(number, "python", source) for number, source in enumerate(sources)]
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(text.count("\n", 0, each.start()) + 1, each[1], each[2]) for each in found]


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a `bash` block as words, continued lines joined."""
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check_names(source: str) -> None:
    """The names that a block imports exist, and take the arguments that it gives them."""
    known = {}
    for node in ast.walk(tree := ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = import_module(node.module)
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            parameters = inspect.signature(known[node.func.id]).parameters
            if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
                unknown = {each.arg for each in node.keywords} - {None, *parameters}
                assert not unknown, f"{node.func.id} has no argument {', '.join(unknown)}"


def check_options(command: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The options exist and their values are taken; nothing is done with them."""

    class Read(Exception):
        pass

    module = import_module(f"hf_draftkd.cli.{command}")
    parse = module.parse

    def only_parse(*given):
        parse(*given)
        raise Read

    monkeypatch.setattr(module, "parse", only_parse)
    with pytest.raises(Read):
        module.run(options)
    monkeypatch.setattr(module, "parse", parse)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with `draft` and `target`, in float32: many CPUs have to emulate bfloat16."""
    folder = tmp_path_factory.mktemp("org")
    draft, target = (load_target(demo_path(name), dtype="float32") for name in ("draft", "target"))
    for name, model in (("draft", draft), ("target", build_draft(target, num_layers=3))):
        model.save_pretrained(folder / name)
        load_tokenizer(demo_path(name)).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, models, tmp_path, monkeypatch):
    """The blocks belong to one session: later ones use what earlier ones made."""
    found = blocks(page)
    assert any(block.is_run for block in found)
    queries = Path(demo_path("dev.jsonl")).read_text(encoding="utf-8").splitlines()[:24]
    (tmp_path / "prompts.jsonl").write_text("\n".join(queries[:16]), encoding="utf-8")
    (tmp_path / "other_prompts.jsonl").write_text("\n".join(queries[16:]), encoding="utf-8")
    (tmp_path / "org").symlink_to(models)  # so that "org/target" is a path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in found:
        text = block.text
        for name, value in STAND_INS.items() if block.is_run else ():
            text = text.replace(name, value)
        if block.language == "python" and block.is_run:
            exec(compile("\n" * block.line + text, str(page), "exec"), namespace)
        elif block.language == "python":
            check_names(text)
        elif block.language == "bash":
            for program, *words in commands(text):
                if program != "draftkd":
                    assert not block.is_run, f"{page.name}:{block.line}: what is not `draftkd` is not run here: say so"
                elif block.is_run:
                    assert dispatch([*words, *SHORT.get(words[0], "").split()]) == 0
                else:
                    check_options(words[0], words[1:], monkeypatch)
        else:
            assert block.language in ("json", "text"), f"{page.name}:{block.line}: a block of what?"


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """A guide that was renamed, a section that was reworded."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {target}"


def test_the_table_of_draft_sizes_is_what_its_lines_print(capsys):
    page = ROOT / "examples" / "guides" / "new_draft.md"
    (block,) = (block for block in blocks(page) if "best_draft_length" in block.text)
    exec(block.text, {})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 6
    assert printed in page.read_text(encoding="utf-8")


def test_the_readme_names_every_guide():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page for page in PAGES[1:] if f"({page.relative_to(ROOT)})" not in readme]


def test_the_notebook_is_one_and_holds_no_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert "".join(cell["source"]).strip()
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_custom_divergence_example_is_short_and_helps(tmp_path, capsys, monkeypatch):
    text = (ROOT / "examples" / "custom_divergence.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    script = tmp_path / "custom_divergence.py"
    script.write_text(text.replace("limit=128", "limit=24").replace("max_new_tokens=96", "max_new_tokens=16"))
    words = ["--max_steps", "4", "--per_device_train_batch_size", "4", "--learning_rate", "2e-3", "--output_dir"]
    monkeypatch.setattr(sys, "argv", [str(script), *words, str(tmp_path / "out")])
    run_path(str(script), run_name="__main__")
    before, after = map(float, re.findall(r"(\d+\.\d+) (?:before|after)", capsys.readouterr().out))
    assert after > before


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_names_every_command(command):
    assert f"draftkd {command}" in (ROOT / "README.md").read_text(encoding="utf-8")


def names_in(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


@pytest.mark.parametrize("title", ["GKD", "Distillation", "GOLD"])
def test_options_of_trl_and_of_ours_exist(title, monkeypatch):
    """An option that trl renamed, or that we did."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    configs = {
        "GKD": "trl.experimental.gkd.GKDConfig",
        "Distillation": "trl.DistillationConfig",
        "GOLD": "trl.experimental.gold.GOLDConfig",
    }
    theirs = _fields(configs[title])
    ours = _fields("hf_draftkd.DraftDistillConfig") | {"target_model"}
    page = (ROOT / "examples" / "guides" / "coming_from_trl.md").read_text(encoding="utf-8")
    section = page.partition(f"## {title}Trainer\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    assert rows
    for there, here, _ in rows:
        assert names_in(there) <= theirs
        assert names_in(here) <= ours


def _fields(name: str) -> set[str]:
    module, _, attribute = name.rpartition(".")
    return set(getattr(import_module(module), attribute).__dataclass_fields__)
