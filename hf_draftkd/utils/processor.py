"""Advice on what makes a CPU slow: threads on shared cores, bfloat16 without instructions for it."""

import os

import torch


def shared_cores() -> str | None:
    """A sentence of advice where torch has more threads than other work leaves cores; None where that is not known.

    The threads of a matrix product wait for the slowest of them, and on a shared core that one waits for its turn. The
    load average counts what ran or waited on all cores in the last minute, this process too: ask before it works.
    """
    threads, cores = torch.get_num_threads(), os.cpu_count()
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return None
    # Three quarters: a program that began a minute ago has not come to 1 yet.
    free = max(1, (cores or 1) - int(load + 0.25))
    if threads <= free:
        return None
    return (
        f"Other work shares the cores: the load average of the last minute is {load:.1f} on {cores} cores, and torch "
        f"computes with {threads} threads, which then wait for each other and may take many times as long as one. "
        f"Start with OMP_NUM_THREADS={free}, or call torch.set_num_threads({free})."
    )


def emulated_bfloat16() -> str | None:
    """A sentence of advice for a CPU known to have no instructions for bfloat16; None for others.

    x86-64 with AVX2 alone was seen to be slow; with AVX-512 but without bfloat16 nothing is known, and nothing is said.
    """
    processor = torch.cpu.get_capabilities()
    if processor.get("architecture") != "x86_64" or processor.get("avx512_f"):
        return None
    return (
        "This CPU has no instructions for bfloat16 and emulates it: passes over several tokens, as verification and "
        'training need, take several times as long as in float32. Load with `dtype="float32"`.'
    )
