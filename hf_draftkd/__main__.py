"""`python -m hf_draftkd` is `draftkd`, so that launchers can start it: `accelerate launch -m hf_draftkd train ...`."""

from hf_draftkd.cli.main import main

if __name__ == "__main__":
    main()
