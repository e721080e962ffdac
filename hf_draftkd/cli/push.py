"""`draftkd push`: publish a draft on the Hub, or show what would be published."""

import sys
from dataclasses import dataclass, field
from typing import Literal

from hf_draftkd.cli.errors import UsageError
from hf_draftkd.cli.options import parse, required
from hf_draftkd.hub.push import push_draft
from hf_draftkd.utils.text import printable


@dataclass
class PushOptions:
    """What to publish, and where."""

    model: str | None = field(default=None, metadata={"help": "Folder of the draft."})
    repo_id: str | None = field(default=None, metadata={"help": "`user/name` on the Hub; `name` for yourself."})
    report: str | None = field(
        default=None, metadata={"help": "The draft's report. Default: report.json in the folder or beside it."}
    )
    license: str | None = field(default=None, metadata={"help": "Licence. Default: that of the base model."})
    language: list[str] | None = field(default=None, metadata={"help": "Language codes for the card's metadata."})
    tags: list[str] = field(default_factory=list, metadata={"help": "Further tags."})
    private: bool = field(
        default=False, metadata={"help": "Make a new repository private; refuses an existing public one."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    commit_message: str = field(default="Upload draft model", metadata={"help": "First line of the commit."})
    benchmark_task: str | None = field(
        default=None, metadata={"help": "Also write a leaderboard result for this task of the report's benchmark."}
    )
    prose: Literal["hub", "local"] | None = field(
        default=None, metadata={"help": "Whose words to keep where the card was edited on the Hub and in the folder."}
    )
    allow_mismatch: bool = field(
        default=False, metadata={"help": "Publish although report and weights do not fit together; the card says so."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Show what would be uploaded, and upload nothing."})


def run(argv: list[str]) -> int:
    """Run `draftkd push *argv`."""
    (options,) = parse("push", [PushOptions], argv, "Publish a draft model on the Hugging Face Hub.")
    required(model=options.model, repo_id=options.repo_id)
    given = vars(options)
    folder, repo_id = given.pop("model"), given.pop("repo_id")
    # Without the option the organisation's default decides.
    given["private"] = options.private or None
    try:
        upload = push_draft(folder, repo_id, **given)
    except ConnectionError as error:
        # The Hub or the network failed: nothing the user typed was wrong.
        print(f"draftkd push: {printable(error)}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(printable(upload))
    if options.dry_run:
        print(f"\n{'-' * 20} README.md {'-' * 20}\n{printable(upload.card.render())}")
        print("dry run: nothing was uploaded")
    else:
        print(f"published: {upload.url}")
    return 0
