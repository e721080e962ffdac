"""What every room needs and no room owns: checking values, whole files, hashes, text that is safe to print."""
