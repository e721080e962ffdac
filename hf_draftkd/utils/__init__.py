"""What every room needs and no room owns: checks of values, whole files, hashes, text that is safe to print."""
