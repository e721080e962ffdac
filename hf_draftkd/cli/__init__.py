"""The `draftkd` command: one small file a subcommand."""
