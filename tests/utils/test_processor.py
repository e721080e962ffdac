"""Advice on loads and processors that are made up."""

import os

import pytest
import torch

from hf_draftkd.utils.processor import emulated_bfloat16, shared_cores


@pytest.fixture
def machine(monkeypatch):
    def of(cores, load, threads):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    return of


@pytest.mark.parametrize(
    ("cores", "load", "threads", "advised"),
    [
        (2, 0.3, 2, None),  # what importing torch alone brings about
        (2, 0.9, 2, 1),  # one other program
        (2, 11.0, 2, 1),
        (2, 11.0, 1, None),  # nothing better is left
        (64, 30.0, 32, None),
        (64, 60.2, 32, 4),
    ],
)
def test_threads_that_other_work_leaves_no_cores_for_are_advised_against(machine, cores, load, threads, advised):
    machine(cores, load, threads)
    advice = shared_cores()
    assert advice is None if advised is None else f"OMP_NUM_THREADS={advised}," in advice


def test_a_system_without_a_load_average_is_left_in_peace(machine, monkeypatch):
    machine(2, 0.0, 2)
    monkeypatch.delattr(os, "getloadavg")
    assert shared_cores() is None


@pytest.mark.parametrize(
    ("found", "emulates"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": False}, True),
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False}, False),  # not measured
        ({"architecture": "aarch64"}, False),
    ],
)
def test_bfloat16_is_advised_against_where_it_is_known_to_be_slow(monkeypatch, found, emulates):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert (emulated_bfloat16() is not None) == emulates
