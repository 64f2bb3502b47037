"""The device behind a name, and the start-up self-test of the float32 product."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from visard import device
from visard.device import choose_device, choose_float32_matmul
from visard.errors import UserError


def test_auto_takes_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert choose_device("auto").type == expected


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("cpu") == torch.device("cpu")
    for name, message in (
        ("cuda", "sees 0 CUDA devices"),
        ("mps", "no Apple GPU"),
        ("gpu", "'gpu' is unknown; use auto, cuda, cuda:N, mps or cpu"),
        ("meta", "'meta' is unknown"),
        ("", "unknown"),
    ):
        with pytest.raises(UserError, match=message):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="sees 2 CUDA devices"):
        choose_device("cuda:2")


def test_the_self_test_is_quick_and_leaves_the_setting() -> None:
    before = torch.get_float32_matmul_precision()
    choose_float32_matmul("auto")
    started = time.perf_counter()
    assert choose_float32_matmul("auto") in ("highest", "medium")
    assert time.perf_counter() - started < 0.01, "the answer is kept for the process"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("error", "faster", "expected"),
    [(4e-7, True, "medium"), (4e-7, False, "highest"), (3e-3, True, "highest"), (float("nan"), True, "highest")],
)
def test_medium_only_if_accurate_and_faster(
    monkeypatch: pytest.MonkeyPatch, error: float, faster: bool, expected: str
) -> None:
    monkeypatch.setattr(device, "_relative_error", lambda precision: error)
    monkeypatch.setattr(device, "_medium_is_faster", lambda: faster)
    device._measured_choice.cache_clear()
    try:
        assert choose_float32_matmul("auto") == expected
    finally:
        device._measured_choice.cache_clear()


@pytest.mark.parametrize("elsewhere", ["cuda", "mps"])
def test_what_a_cpu_finds_faster_says_nothing_of_a_gpu(monkeypatch: pytest.MonkeyPatch, elsewhere: str) -> None:
    """There "medium" means TF32."""
    monkeypatch.setattr(device, "_measured_choice", lambda: "medium")
    assert choose_float32_matmul("auto") == "medium"
    assert choose_float32_matmul("auto", torch.device(elsewhere)) == "highest"
    assert choose_float32_matmul("high", torch.device(elsewhere)) == "high"


def test_a_setting_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_relative_error", lambda precision: pytest.fail("no test was asked for"))
    for setting in ("highest", "high", "medium"):
        assert choose_float32_matmul(setting) == setting


def test_the_error_told_is_that_of_the_product() -> None:
    """float32 sits near 2e-7 here; the same product with operands rounded to bf16 is four orders worse."""
    before = torch.get_float32_matmul_precision()
    try:
        assert 1e-8 < device._relative_error("highest") < device.FLOAT32_RELATIVE_ERROR
    finally:
        torch.set_float32_matmul_precision(before)
    left, right = device._operands(256, 512, 256)
    rounded = left.bfloat16().float() @ right.bfloat16().float()
    truth = left.double() @ right.double()
    assert (rounded - truth).norm() / truth.norm() > 1000 * device.FLOAT32_RELATIVE_ERROR


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_kept() -> None:
    """In a process of its own: a round of 284 MB in buffers faults in 70,000 pages before, and hardly any after."""
    script = """
import resource, torch
from visard.device import keep_freed_memory
def rounds(count):
    for _ in range(count):
        buffers = [torch.ones(megabytes * 2**18) for megabytes in (100, 30, 64, 40, 50)]
        del buffers
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    rounds(2)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 2
rounds(1)
before = faults()
kept = keep_freed_memory()
rounds(3)
print(int(kept), before, faults())
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    kept, before, after = map(int, answer.split())
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert before > 50_000
    assert after < 100


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_large_pages_are_asked_for_where_they_help() -> None:
    """The kernel marks the memory ("hg"), and it holds what is written; small tensors are left alone."""
    large, small = torch.empty(1 << 25), torch.empty(1 << 10)
    assert not device.ask_for_large_pages(small)
    if not device.ask_for_large_pages(large):
        pytest.skip("a kernel without transparent huge pages")
    middle = large.data_ptr() + large.nbytes // 2
    flags, inside = "", False
    with open("/proc/self/smaps", encoding="ascii") as file:
        for line in file:
            if "-" in line.split()[0]:
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                inside = begin <= middle < end
            elif inside and line.startswith("VmFlags:"):
                flags = line
    assert " hg" in flags
    large.fill_(2.0)
    assert large.sum(dtype=torch.float64).item() == 2.0 * len(large)
