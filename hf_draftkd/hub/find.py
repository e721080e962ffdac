"""Find drafts for a target, best first, with the metrics that their cards record.

    for draft in find_drafts("org/target"):
        print(draft.repo_id, draft.acceptance_rate, draft.remarks)
    draft_model = load_draft(find_drafts("org/target")[0])

Metrics are read from the `model-index` in the answer of one listing: no file of a stranger is downloaded.
`SpeculationReport.load(hf_hub_download(draft.repo_id, "report.json"))` reads the whole report of a draft that has one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from huggingface_hub import HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import ExpandModelProperty_T
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.recommendation import ASSISTANT_MODEL, PARALLEL, SPECULATIVE
from hf_draftkd.evaluation.schema import to_plain
from hf_draftkd.hub.access import hub_errors
from hf_draftkd.hub.metadata import draft_for_tag
from hf_draftkd.models.resolve import is_hub_id
from hf_draftkd.utils.checks import in_range, whole_number
from hf_draftkd.utils.text import one_line

# More than any model has; what claims more is not a count that arithmetic should meet.
_MAX_PARAMETERS = 10**15
# The field of `RecordedSetting` that holds the speed-up by a way of decoding.
SPEEDUPS = {ASSISTANT_MODEL: "speedup", SPECULATIVE: "speculative_speedup", PARALLEL: "parallel_speedup"}
# A metric outside of these was not measured, whatever a card says.
_POSSIBLE = {
    "acceptance_rate": (0.0, 1.0),
    "block_efficiency": (1.0, 1e3),
    "speedup": (0.0, 1e3),
    "relative_cost": (0.0, 1e3),
}
_AGAIN = "Try again later, or search on https://huggingface.co/models?other=draft-model."
# A commit, or the beginning of one as `git` and the Hub's pages shorten it.
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
# How the Hub tags a model with what it derives from; `base_model:quantized:...` and the like name it again.
_BASE_TAG = re.compile(r"base_model:([^:]+)")
# Drafts of one target that are ranked, whatever the limit.
_MOST_LISTED = 1000
# How far up a target's family to look: a fine-tune's base often has drafts already.
_MAX_GENERATIONS = 3
# Not `cardData`: huggingface_hub passes what a stranger wrote there to a constructor, and one that it cannot take (tags
# that are a number) ends the whole listing. What is needed of it stands in the tags and the model index.
_EXPAND: list[ExpandModelProperty_T] = ["downloads", "likes", "model-index", "private", "safetensors", "sha", "tags"]


@dataclass(frozen=True)
class RecordedSetting:
    """What a draft's card records about one decoding setting; what the card does not say is None.

    `speedup` is that by `assistant_model=`, `speculative_speedup` that by `SpeculativeDecoding`, `parallel_speedup`
    that by `SpeculativeDecoding` with a parallel draft, one pass of it a round; all on the `hardware` named.
    """

    decoding: DecodingSetting
    verification: str | None = None
    acceptance_rate: float | None = None
    block_efficiency: float | None = None
    num_assistant_tokens: int | None = None
    speedup: float | None = None
    speculative_speedup: float | None = None
    parallel_speedup: float | None = None
    hardware: str | None = None
    target: str | None = None
    target_revision: str | None = None
    domain: str | None = None


@dataclass(frozen=True)
class FoundDraft:
    """A draft on the Hub. Whatever loads a model by `repo_id` and `revision` takes it, `load_draft` for one.

    `revision` is the commit that was listed, `target` the model it is tagged for: the one asked about, or one that it
    derives from. `remarks` says what a person should know: missing metrics, another revision of the target, another
    target. All else is as recorded.
    """

    repo_id: str
    revision: str | None
    target: str
    settings: tuple[RecordedSetting, ...] = ()
    num_parameters: int | None = None
    relative_cost: float | None = None
    license: str | None = None
    downloads: int | None = None
    likes: int | None = None
    private: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def typical(self) -> RecordedSetting | None:
        """The setting where the draft helps least: the one that a promise can be made about."""
        measured = [setting for setting in self.settings if setting.acceptance_rate is not None]
        return min(measured, key=lambda setting: setting.acceptance_rate or 0.0, default=None)

    @property
    def acceptance_rate(self) -> float | None:
        return self.typical.acceptance_rate if self.typical else None

    @property
    def block_efficiency(self) -> float | None:
        return self.typical.block_efficiency if self.typical else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; absent where not recorded."""
        return to_plain(self)


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
    revision before others, those with metrics before those without. Among equals the order is by memory-bound speed-up
    τ ÷ (c·γ + 1), c being the share of the parameters, in the measured setting where the draft helps least; then by
    acceptance rate; then by downloads.

    Args:
        target: Hub id.
        revision: Commit, branch or tag of the target that metrics should be about; by default its latest commit.
        include_base_models: Also look for drafts of the models the target derives from.
        limit: At most this many per target, the best.
        token: Access token, for private drafts; by default the one that is logged in.

    Raises:
        ValueError: `target` is not a Hub id, or has no such revision.
        ConnectionError: The Hub cannot be reached.
    """
    if not is_hub_id(target):
        raise ValueError(f"Drafts are found by the Hub id of their target (`organisation/name`), got {target!r}.")
    whole_number("limit", limit)
    api = HfApi(token=token)
    with hub_errors(f"looking for drafts of {target}", afterwards=_AGAIN, token=token or get_token()):
        family = islice(_family(api, target, revision), None if include_base_models else 1)
        found: list[FoundDraft] = []
        seen: set[str] = set()
        for name, sha, parameters in family:
            # All, since the Hub's order knows nothing of metrics.
            listed = api.list_models(filter=["draft-model", draft_for_tag(name)], limit=_MOST_LISTED, expand=_EXPAND)
            drafts = [_read(info, name, target, sha) for info in listed if info.id not in seen]
            seen |= {draft.repo_id for draft in drafts}
            found += sorted(drafts, key=partial(_rank, sha=sha, target_parameters=parameters))[:limit]
    return found


def _family(api: HfApi, target: str, revision: str | None) -> Iterator[tuple[str, str | None, int | None]]:
    """(name, commit, parameters) of the target at a revision and of what it derives from, nearest first.

    Cards record commits, so a branch's name would never equal one. A revision that the Hub does not resolve stands for
    itself if it is a commit or the beginning of one; a branch that cannot be seen from here could mean any commit.
    """
    name: str | None = target
    seen: set[str] = set()
    while name and name not in seen and len(seen) < _MAX_GENERATIONS:
        seen.add(name)
        asked = revision if name == target else None
        info, sha = None, asked if asked and _COMMIT.fullmatch(asked) else None
        try:
            info = api.model_info(name, expand=["safetensors", "sha", "tags"])
            sha = info.sha if asked is None else api.model_info(name, revision=asked, expand=["sha"]).sha
        except RevisionNotFoundError:
            if sha is None:
                raise ValueError(
                    f"{name} has no revision {asked!r}. Give a branch, a tag or a commit (7 digits or more)."
                ) from None
        except HfHubHTTPError as error:
            # A target that is not, or not visibly, on the Hub can have drafts there nevertheless.
            if error.response.status_code not in (401, 403, 404):
                raise
        yield name, sha, _parameters(info) if info else None
        bases = [match[1] for tag in (info.tags if info else None) or () if (match := _BASE_TAG.fullmatch(str(tag)))]
        name = next(filter(is_hub_id, bases), None)


def _is_about(recorded: str | None, commit: str | None) -> bool:
    """Whether a recorded commit is the one asked about, which may be shortened."""
    return bool(recorded and commit and recorded.startswith(commit))


def _parameters(info: ModelInfo) -> int | None:
    total = info.safetensors.total if info.safetensors else None
    return total if isinstance(total, int) and 0 < total <= _MAX_PARAMETERS else None


def _read(info: ModelInfo, made_for: str, asked: str, sha: str | None) -> FoundDraft:
    settings, relative_cost = _recorded(info)
    remarks = []
    if made_for != asked:
        remarks.append(f"made for {made_for}, which {asked} derives from")
    if not settings:
        remarks.append("no metrics recorded")
    elsewhere = {setting.target for setting in settings} - {None, made_for}
    if elsewhere:
        remarks.append(f"metrics were measured on {', '.join(sorted(map(str, elsewhere)))}")
    revisions = {setting.target_revision for setting in settings}
    if None in revisions:
        remarks.append("the target's revision was not recorded")
    if sha and any(revision and not _is_about(revision, sha) for revision in revisions):
        remarks.append("metrics were measured on another revision of the target")
    licenses = [tag.removeprefix("license:") for tag in info.tags or () if str(tag).startswith("license:")]
    return FoundDraft(
        repo_id=info.id,
        revision=info.sha,
        target=made_for,
        settings=settings,
        num_parameters=_parameters(info),
        relative_cost=relative_cost,
        license=_text(licenses[0]) if licenses else None,
        downloads=info.downloads,
        likes=info.likes,
        private=bool(info.private),
        remarks=tuple(remarks),
    )


def _recorded(info: ModelInfo) -> tuple[tuple[RecordedSetting, ...], float | None]:
    """The metrics of a card, results of one setting put back together, and its relative cost.

    A stranger wrote the model index: one of another shape, or with a value that nothing can have measured, counts as
    none, so that it neither ends the listing nor leads it.
    """
    settings: dict[tuple, dict[str, Any]] = {}
    relative_cost = None
    try:
        index: Any = info.model_index
        for result in model_index_to_eval_results(index)[1] if index else ():
            if result.metric_type not in _POSSIBLE:
                continue
            value = float(in_range(result.metric_type, result.metric_value, *_POSSIBLE[result.metric_type]))
            if result.metric_type == "relative_cost":
                relative_cost = value if relative_cost is None else relative_cost
                continue
            args = result.metric_args or {}
            shared = {
                "decoding": DecodingSetting.from_row(args),
                "domain": _text(result.dataset_config),
                **{name: _text(args.get(name)) for name in ("verification", "target", "target_revision")},
            }
            held = settings.setdefault(tuple(shared.values()), shared)
            if result.metric_type == "speedup":
                way = args.get("way", ASSISTANT_MODEL)
                if way in SPEEDUPS:  # a later version may know more
                    held |= {SPEEDUPS[way]: value, "hardware": _text(args.get("hardware"))}
                continue
            held[result.metric_type] = value
            if result.metric_type == "block_efficiency" and "num_assistant_tokens" in args:
                held["num_assistant_tokens"] = whole_number("num_assistant_tokens", args["num_assistant_tokens"])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return (), None
    return tuple(RecordedSetting(**held) for held in settings.values()), relative_cost


def _text(value: object) -> str | None:
    return None if value is None else one_line(value)[:200]


def _rank(draft: FoundDraft, *, sha: str | None, target_parameters: int | None) -> tuple:
    """Smaller is better, among drafts for one target."""
    typical, cost, speedup = draft.typical, draft.relative_cost, 0.0
    if draft.num_parameters and target_parameters:
        cost = draft.num_parameters / target_parameters
    if cost is not None and typical and typical.block_efficiency and typical.num_assistant_tokens:
        speedup = typical.block_efficiency / (cost * typical.num_assistant_tokens + 1)
    return (
        typical is None,
        typical is None or not _is_about(typical.target_revision, sha),
        -speedup,  # never 0 where it is known
        -(draft.acceptance_rate or 0.0),
        -(draft.downloads or 0),
        draft.repo_id,
    )
