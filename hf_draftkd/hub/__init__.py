"""Share a draft, find a draft.

card.py        the model card, from data alone; summary.py, figures.py, metadata.py, engines.py, citations.py feed it
sections.py    which parts of a card are rewritten, and which belong to its owner
markdown.py    names and texts from others, made harmless
"""
