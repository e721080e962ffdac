"""`draftkd push`: publish a draft on the Hub, or show what would be published."""

from dataclasses import dataclass
from typing import Literal

from hf_draftkd.cli.errors import usage_errors
from hf_draftkd.cli.options import parse, required
from hf_draftkd.hub.push import push_draft
from hf_draftkd.utils.fields import option
from hf_draftkd.utils.text import printable


@dataclass
class PushOptions:
    """What to publish, and where."""

    model: str | None = option(None, "Folder of the draft.")
    repo_id: str | None = option(None, "`user/name` on the Hub; `name` for yourself.")
    report: str | None = option(None, "The draft's report. Default: report.json in the folder or beside it.")
    license: str | None = option(None, "Licence. Default: that of the base model.")
    language: list[str] | None = option(None, "Language codes for the card's metadata.")
    tags: list[str] = option([], "Further tags.")
    private: bool = option(False, "Make a new repository private; refuses an existing public one.")
    revision: str | None = option(None, "Branch to commit to, or a pull request, such as refs/pr/3.")
    create_pr: bool = option(False, "Open a pull request instead of committing.")
    commit_message: str = option("Upload draft model", "First line of the commit.")
    benchmark_task: str | None = option(
        None, "Also write a leaderboard result for this task of the report's benchmark."
    )
    prose: Literal["hub", "local"] | None = option(
        None, "Whose words to keep where the card was edited on the Hub and in the folder."
    )
    custom_generate: bool = option(
        False, "Also publish code with which `generate(custom_generate=REPO_ID)` decodes as SpeculativeDecoding does."
    )
    allow_mismatch: bool = option(False, "Publish although report and weights do not fit together; the card says so.")
    dry_run: bool = option(False, "Show what would be uploaded, and upload nothing.")


def run(argv: list[str]) -> int:
    about = "Publish a draft model on the Hugging Face Hub."
    (options,) = parse("push", [PushOptions], argv, about, "--model DRAFT --repo_id USER/NAME")
    required(model=options.model, repo_id=options.repo_id)
    given = vars(options)
    folder, repo_id = given.pop("model"), given.pop("repo_id")
    # Without the option the organisation's default decides.
    given["private"] = options.private or None
    with usage_errors():
        upload = push_draft(folder, repo_id, **given)
    print(printable(upload))
    if options.dry_run:
        print(f"\n{'-' * 20} README.md {'-' * 20}\n{printable(upload.card.render())}")
        print("dry run: nothing was uploaded")
    else:
        print(f"published: {upload.url}")
    return 0
