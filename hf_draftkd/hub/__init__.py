"""Share a draft, find a draft.

card.py         the model card, from data alone
  summary.py      what a card says beyond the report: training, pair, provenance
  parts.py        what its sections say; names.py keeps paths of this machine out of the report
  figures.py      from a report to tables; metadata.py to the YAML block; engines.py to commands; citations.py
publishing.py   push: plan, then one commit
  planning.py     what goes in: report, facts, whose words; contents.py the list of files
discovery.py    find: which drafts there are for a target, best first
access.py       tokens, and what the Hub's refusals mean

What the cards of drafts share with those of alignment data lies lower, in `data`: markdown.py, card_sections.py and
public_names.py.
"""
