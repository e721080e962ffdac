"""Share a draft, find a draft."""
