"""Two models, and what makes them a pair."""
