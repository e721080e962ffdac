"""Run `draftkd` as a user does: in its own process, with exit code and output."""

import subprocess

from tests.processes import ROOT as ROOT
from tests.processes import python


def draftkd(*argv) -> subprocess.CompletedProcess:
    """`python -m hf_draftkd *argv`."""
    return python("-m", "hf_draftkd", *argv)
