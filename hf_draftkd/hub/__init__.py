"""Share a draft, find a draft.

push.py                  publish a draft: look, plan, one commit
  upload_files.py          which files go in, and what does not fit together
  repository.py            the repository as it is, and the one commit that changes it
  access.py                tokens, and what the Hub's refusals mean
find.py                  which drafts there are for a target, best first
model_card.py            the card of a draft, from data alone; its words stand in templates/
  provenance.py            what a card says beyond the report: training, pair, where the files come from
  report_tables.py         from a report to tables; metadata.py to the results that the Hub indexes
  serving_commands.py      how engines start the pair; citations.py the papers
  llama_cpp.py             whether llama.cpp's converter takes the pair's tokenizer
dataset_card.py          the card of alignment data, and publishing it
card_merge.py            a card written again: metrics are new, what people wrote is kept
markdown.py              text from others, escaped; public_names.py keeps paths of this machine out
"""
