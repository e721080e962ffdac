"""`draftkd vocabulary`: choose the tokens that a draft proposes from what its target writes, and record them."""

from dataclasses import dataclass

from hf_draftkd.cli.errors import usage_errors
from hf_draftkd.cli.options import parse, required, whole_draft
from hf_draftkd.data.sources import open_dataset
from hf_draftkd.data.vocabulary import choose_draft_vocabulary, vocabulary_coverage
from hf_draftkd.decoding.drafting import checked_vocabulary
from hf_draftkd.models.draft_length import write_draft_settings
from hf_draftkd.models.resolve import resolve
from hf_draftkd.models.tokenizers import listed_ids
from hf_draftkd.utils.fields import option


@dataclass
class VocabularyOptions:
    """Which draft, which text, and how many tokens."""

    model: str | None = option(None, "Folder of the draft; its generation config is changed.")
    dataset: str | None = option(None, "Text that the target wrote: what `draftkd generate` makes, or an id.")
    dataset_config: str | None = option(None, "Configuration (subset) of a Hub dataset.")
    dataset_split: str = option("train", "Its split.")
    size: int | None = option(None, "Tokens that the draft may propose: 8192, for instance.")
    trust_remote_code: bool = option(False, "Allow code that comes with the draft.")


def run(argv: list[str]) -> int:
    about = "Choose the tokens that a draft proposes."
    (options,) = parse("vocabulary", [VocabularyOptions], argv, about, "--model DRAFT --dataset DATA --size N")
    required(model=options.model, dataset=options.dataset, size=options.size)
    folder = whole_draft(options.model, "`draftkd vocabulary`")
    with usage_errors():
        checkpoint = resolve(folder, trust_remote_code=options.trust_remote_code)
        config = checkpoint.config.get_text_config()
        rows = open_dataset(options.dataset, split=options.dataset_split, config=options.dataset_config)
        ids = choose_draft_vocabulary(rows, options.size, keep=listed_ids(config.eos_token_id))
        checked_vocabulary(ids, config.vocab_size)
        written = write_draft_settings(folder, {"draft_vocabulary": ids}, options.trust_remote_code)
    coverage = vocabulary_coverage(rows, ids)
    print(
        f"The draft may propose {len(ids):,} of {config.vocab_size:,} tokens, which are {coverage:.2%} of what the "
        f"target wrote there. Written: {written}"
    )
    if len(ids) < options.size:
        print(f"No more different tokens occur: more text would fill `--size {options.size}`.")
    return 0
