"""Find drafts for a target, best first, with the figures that their cards record.

    for draft in find_drafts("org/target"):
        print(draft.repo_id, draft.acceptance_rate, draft.remarks)
    draft_model = load_draft(find_drafts("org/target")[0])

Figures are read from the `model-index` in the answer of one listing; no file of a stranger is downloaded until
`FoundDraft.load_report` is called, and that reads one JSON file, by name, size and schema.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import ExpandModelProperty_T
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.access import hub_errors
from hf_draftkd.hub.metadata import draft_for_tag
from hf_draftkd.hub.provenance import MAX_JSON_BYTES, read_json
from hf_draftkd.hub.upload_files import REPORT_FILE
from hf_draftkd.models.resolve import is_hub_id
from hf_draftkd.utils.text import one_line

# More than any model has; what claims more is no count that arithmetic should meet.
_MAX_PARAMETERS = 10**15
# A figure outside of these was not measured, whatever a card says.
_POSSIBLE = {
    "acceptance_rate": (0.0, 1.0),
    "block_efficiency": (1.0, 1e3),
    "speedup": (0.0, 1e3),
    "relative_cost": (0.0, 1e3),
}
_AGAIN = "Try again later, or search on https://huggingface.co/models?other=draft-model."
# A commit, or the beginning of one as `git` and the Hub's pages shorten it.
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
# How far up a target's family to look: a fine-tune's base often has drafts already.
_MAX_GENERATIONS = 3
# Not `cardData`: huggingface_hub passes what a stranger wrote there to a constructor, and one that it cannot take (tags
# that are a number) ends the whole listing. What is needed of it stands in the tags and the model index.
_EXPAND: list[ExpandModelProperty_T] = [
    "downloads",
    "likes",
    "model-index",
    "private",
    "safetensors",
    "sha",
    "tags",
]


@dataclass(frozen=True)
class Figure:
    """One measured setting of a draft, as its card records it; what the card does not say is None."""

    temperature: float | None
    verification: str | None
    acceptance_rate: float | None = None
    block_efficiency: float | None = None
    num_assistant_tokens: int | None = None
    speedup: float | None = None
    hardware: str | None = None
    target: str | None = None
    target_revision: str | None = None
    domain: str | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class FoundDraft:
    """A draft on the Hub. Whatever loads a model by `repo_id` and `revision` takes it, `load_draft` for one.

    Args:
        repo_id, revision: Where it is; the revision is the commit that was listed.
        target: The model it is tagged for: the one asked about, or one that it derives from.
        figures: What was measured, per setting.
        num_parameters, relative_cost, license, downloads, likes, private: As recorded.
        remarks: What a person should know: missing figures, another revision of the target, another target.
    """

    repo_id: str
    revision: str | None
    target: str
    figures: tuple[Figure, ...] = ()
    num_parameters: int | None = None
    relative_cost: float | None = None
    license: str | None = None
    downloads: int | None = None
    likes: int | None = None
    private: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def typical(self) -> Figure | None:
        """The setting where the draft helps least: the one that a promise can be made about."""
        measured = [figure for figure in self.figures if figure.acceptance_rate is not None]
        return min(measured, key=lambda figure: figure.acceptance_rate or 0.0, default=None)

    @property
    def acceptance_rate(self) -> float | None:
        return self.typical.acceptance_rate if self.typical else None

    @property
    def block_efficiency(self) -> float | None:
        return self.typical.block_efficiency if self.typical else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; absent where not recorded."""
        plain = asdict(self)
        plain["figures"] = [{k: v for k, v in figure.items() if v is not None} for figure in plain["figures"]]
        return {name: value for name, value in plain.items() if value is not None}

    def load_report(self, token: str | None = None) -> SpeculationReport:
        """Download and check the whole report.

        Raises:
            ValueError: There is none, it is too large, or it is not a report.
            ConnectionError: The Hub cannot be reached.
        """
        api = HfApi(token=token)
        with hub_errors(f"reading the report of {self.repo_id}", afterwards=_AGAIN, token=token or get_token()):
            sizes = [
                getattr(entry, "size", 0)
                for entry in api.get_paths_info(self.repo_id, REPORT_FILE, revision=self.revision)
            ]
            if not sizes:
                raise ValueError(f"{self.repo_id} has no {REPORT_FILE}; ask its author for one.")
            if sizes[0] > MAX_JSON_BYTES:
                raise ValueError(f"The {REPORT_FILE} of {self.repo_id} has {sizes[0]:,} bytes; that is no report.")
            path = Path(api.hf_hub_download(self.repo_id, REPORT_FILE, revision=self.revision))
        return SpeculationReport.from_dict(read_json(path), f"{self.repo_id}/{REPORT_FILE}")


def find_drafts(
    target: str,
    *,
    revision: str | None = None,
    include_base_models: bool = True,
    limit: int = 50,
    token: str | None = None,
) -> list[FoundDraft]:
    """Drafts on the Hub that are tagged for a target, best first.

    Those made for the target itself come before those made for a model it derives from, those measured on its current
    revision before others, those with figures before those without. Among equals the order is by memory-bound speed-up
    τ ÷ (c·γ + 1), c being the share of the parameters, in the measured setting where the draft helps least; then by
    acceptance rate; then by downloads.

    Args:
        target: Hub id.
        revision: Commit, branch or tag of the target that figures should be about; by default its latest commit.
        include_base_models: Also look for drafts of the models the target derives from.
        limit: At most so many per target.
        token: Access token, for private drafts; by default the one that is logged in.

    Raises:
        ValueError: `target` is no Hub id, or has no such revision.
        ConnectionError: The Hub cannot be reached.
    """
    if not is_hub_id(target):
        raise ValueError(f"Drafts are found by the Hub id of their target (`organisation/name`), got {target!r}.")
    if limit < 1:
        raise ValueError(f"`limit` must be 1 or more, got {limit}.")
    api = HfApi(token=token)
    with hub_errors(f"looking for drafts of {target}", afterwards=_AGAIN, token=token or get_token()):
        family = list(_family(api, target, revision))
        found: dict[str, tuple[tuple, FoundDraft]] = {}
        for generation, (name, sha, parameters) in enumerate(family[: None if include_base_models else 1]):
            tag = draft_for_tag(name)
            for info in api.list_models(filter=["draft-model", tag], limit=limit, expand=_EXPAND):
                if info.id not in found:
                    draft = _read(info, name, target, sha)
                    found[info.id] = (_rank(draft, generation, sha, parameters), draft)
    return [draft for _, draft in sorted(found.values(), key=lambda item: item[0])]


def _family(api: HfApi, target: str, revision: str | None) -> Iterator[tuple[str, str | None, int | None]]:
    """(name, commit, parameters) of the target and of what it derives from, nearest first."""
    name: str | None = target
    seen: set[str] = set()
    while name and name not in seen and len(seen) < _MAX_GENERATIONS:
        seen.add(name)
        info = _info(api, name)
        sha = _commit(api, target, revision) if name == target and revision else info.sha if info else None
        yield name, sha, _parameters(info)
        base = info.card_data.get("base_model") if info and info.card_data else None
        base = base[0] if isinstance(base, list) and base else base
        name = base if isinstance(base, str) and is_hub_id(base) else None


def _commit(api: HfApi, name: str, revision: str) -> str | None:
    """The commit that a revision means; figures record commits, so a branch's name would never equal one.

    What the Hub does not resolve stands for itself if it is a commit or the beginning of one. None where a branch of a
    repository that is not visible from here could mean any commit.

    Raises:
        ValueError: The repository has no such revision.
    """
    try:
        return api.model_info(name, revision=revision, expand=["sha"]).sha
    except RevisionNotFoundError:
        if not _COMMIT.fullmatch(revision):
            raise ValueError(
                f"{name} has no revision {revision!r}. Give a branch, a tag or a commit (7 digits or more)."
            ) from None
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise
    return revision if _COMMIT.fullmatch(revision) else None


def _is_about(recorded: str | None, commit: str | None) -> bool:
    """Whether a figure's commit is the one asked about, which may be shortened."""
    return bool(recorded and commit) and str(recorded).startswith(str(commit))


def _info(api: HfApi, name: str) -> ModelInfo | None:
    """None where the target is not, or not visibly, on the Hub: its drafts can be there nevertheless."""
    try:
        return api.model_info(name, expand=["cardData", "sha", "safetensors"])
    except TypeError:
        # Metadata that huggingface_hub's class for it cannot take: the rest is readable.
        return api.model_info(name, expand=["sha", "safetensors"])
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            return None
        raise


def _parameters(info: ModelInfo | None) -> int | None:
    total = getattr(getattr(info, "safetensors", None), "total", None)
    return total if isinstance(total, int) and 0 < total <= _MAX_PARAMETERS else None


def _read(info: ModelInfo, made_for: str, asked: str, sha: str | None) -> FoundDraft:
    results = _results(info)
    figures = _figures(results)
    remarks = []
    if made_for != asked:
        remarks.append(f"made for {made_for}, which {asked} derives from")
    if not figures:
        remarks.append("no figures recorded")
    elsewhere = {figure.target for figure in figures} - {None, made_for}
    if elsewhere:
        remarks.append(f"figures were measured on {', '.join(sorted(map(str, elsewhere)))}")
    revisions = {figure.target_revision for figure in figures}
    if figures and None in revisions:
        remarks.append("the target's revision was not recorded")
    if sha and any(revision and not _is_about(revision, sha) for revision in revisions):
        remarks.append("figures were measured on another revision of the target")
    costs = [_measured(result) for result in results if result.metric_type == "relative_cost"]
    licenses = [tag.removeprefix("license:") for tag in info.tags or () if str(tag).startswith("license:")]
    return FoundDraft(
        repo_id=info.id,
        revision=info.sha,
        target=made_for,
        figures=figures,
        num_parameters=_parameters(info),
        relative_cost=next((cost for cost in costs if cost is not None), None),
        license=one_line(licenses[0])[:100] if licenses else None,
        downloads=info.downloads,
        likes=info.likes,
        private=bool(info.private),
        remarks=tuple(remarks),
    )


def _results(info: ModelInfo) -> list[EvalResult]:
    """The model index, or nothing where a stranger's metadata has another shape."""
    index = info.model_index
    if not isinstance(index, list) or len(json.dumps(index, default=str)) > MAX_JSON_BYTES:
        return []
    try:
        return model_index_to_eval_results(index)[1]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _figures(results: list[EvalResult]) -> tuple[Figure, ...]:
    """Put the results of one setting back together; values of the wrong type count as not recorded."""
    settings: dict[tuple, dict[str, Any]] = {}
    for result in results:
        if result.metric_type not in ("acceptance_rate", "block_efficiency", "speedup"):
            continue
        value = _measured(result)
        args = result.metric_args if isinstance(result.metric_args, Mapping) else {}
        if value is None:
            continue
        shared = {
            "domain": _text(result.dataset_config),
            **{name: _number(args.get(name)) for name in ("temperature", "top_p", "repetition_penalty")},
            "top_k": _count(args.get("top_k")),
            **{name: _text(args.get(name)) for name in ("verification", "target", "target_revision")},
        }
        held = settings.setdefault(tuple(shared.values()), shared)
        held[result.metric_type] = value
        if result.metric_type == "block_efficiency":
            held["num_assistant_tokens"] = _count(args.get("num_assistant_tokens")) or None
        if result.metric_type == "speedup":
            held["hardware"] = _text(args.get("hardware"))
    return tuple(Figure(**held) for held in settings.values())


def _measured(result: EvalResult) -> float | None:
    """The value of a result, None where no measurement could have given it."""
    value = _number(result.metric_value)
    low, high = _POSSIBLE[result.metric_type]
    return value if value is not None and low <= value <= high else None


def _number(value: Any) -> float | None:
    # Compared before it is converted: JSON has whole numbers that no float can hold.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if is_number else None


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number >= 0 else None


def _text(value: Any) -> str | None:
    return one_line(value)[:200] if isinstance(value, str) else None


def _rank(draft: FoundDraft, generation: int, sha: str | None, target_parameters: int | None) -> tuple:
    """Smaller is better."""
    typical = draft.typical
    is_current = typical is not None and _is_about(typical.target_revision, sha)
    speedup = None
    if typical and typical.block_efficiency and typical.num_assistant_tokens:
        share = None
        if draft.num_parameters and target_parameters:
            share = draft.num_parameters / target_parameters
        cost = share if share is not None else draft.relative_cost
        if cost is not None:
            speedup = typical.block_efficiency / (cost * typical.num_assistant_tokens + 1)
    return (
        generation,
        typical is None,
        not is_current,
        speedup is None,
        -(speedup or 0.0),
        -(draft.acceptance_rate or 0.0),
        -(draft.downloads or 0),
        draft.repo_id,
    )
