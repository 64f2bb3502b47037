"""Where to compute and how: the device behind a name, the float32 product that is fast and still float32, memory.

In: a setting. Out: a torch.device, or the name that torch.set_float32_matmul_precision takes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import time
from typing import Literal

import torch
from torch import Tensor

from visard.errors import UserError

MatmulSetting = Literal["auto", "highest", "high", "medium"]
CPU = torch.device("cpu")
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`run.precision` -> type of the network's products; None = no autocast."""

# A bf16 product is off by about 4e-3 of the result, TF32 by 5e-4, float32 by 2e-7 to 4e-7 (512 summands).
FLOAT32_RELATIVE_ERROR = 1e-6
# Between what was seen: 2.0 on a Zen 5, 1.15 on a Zen 4. Near either, noise would choose the run's last bits.
WORTHWHILE_SPEEDUP = 1.4


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" takes cuda, else mps, else cpu.

    Raises:
        UserError: an unknown name, or a device that this machine or this build of torch does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown; use auto, cuda, cuda:N, mps or cpu") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(
                f"device {name!r} was asked for, but torch {torch.__version__} sees {count} CUDA devices here; "
                "use auto or cpu"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device 'mps' was asked for, but torch finds no Apple GPU here; use auto or cpu")
    elif device.type != "cpu":
        raise UserError(f"device {name!r} is unknown; use auto, cuda, cuda:N, mps or cpu")
    return device


def choose_float32_matmul(setting: MatmulSetting = "auto", device: torch.device = CPU) -> str:
    """The argument for torch.set_float32_matmul_precision.

    On the CPU torch takes "medium" as leave to pick another kernel for float32 products (not for convolutions). On some
    AMD CPUs that kernel is twice as fast and computes in float32; on CPUs with bf16 units it may round the operands to
    bf16. Only a test tells, so "auto" runs one: "medium" where its error against float64 stays that of float32 and it
    is clearly faster, "highest" otherwise. It takes some 40 ms, once a process. Elsewhere "auto" is "highest": "high"
    and "medium" let a GPU use TF32, which is the user's choice.

    Args:
        setting: "auto", or the answer itself.
        device: where the products will be computed.

    Returns:
        "highest", "high" or "medium"; the caller sets it and keeps it in the run: a resumed run must use the same.
    """
    if setting != "auto":
        return setting
    return _measured_choice() if device.type == "cpu" else "highest"


def keep_freed_memory() -> bool:
    """Makes this process keep the memory of freed tensors for the next ones, as CUDA's allocator does.

    By default glibc returns every large buffer to the system at once, and the kernel zeroes its pages anew for the
    next one: 9 to 37 % of an IResNet-50 step on a CPU, by machine (benchmarks/results/train_step.md). Equal to
    starting the process with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ set. The memory held settles within
    a few steps: for IResNet-50 at the same peak, for a small network with changing batches 25 % above (0.87 GB).

    Returns:
        Whether it took effect: only with glibc (Linux), elsewhere nothing is changed.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Parameters of <malloc.h>: never map a buffer by itself, never shrink the heap, and grow it 64 MB at a time.
    mmap_max, trim_threshold, top_pad = -4, -1, -2
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1) and mallopt(top_pad, 2**26))


LARGE_PAGES_FROM = 1 << 26
"""Bytes; smaller tensors gain nothing."""


def ask_for_large_pages(tensor: Tensor) -> bool:
    """Asks the kernel to back a fresh CPU tensor with pages of 2 MB, before its memory is touched for the first time.

    Rows drawn at random from gigabytes of centres otherwise cost a walk through the page tables each: with large pages
    a gather of a tenth of 1 M rows takes a quarter less. Where Linux gives them always or never, nothing changes.

    Args:
        tensor: contiguous, its values not yet written.

    Returns:
        Whether the kernel took the advice; what it then does, or whether the memory was touched before (torch fills new
        tensors in its deterministic mode unless told not to), this does not say.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes < LARGE_PAGES_FROM:
        return False
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return False
    page, huge_page = mmap.PAGESIZE, 14  # MADV_HUGEPAGE of <sys/mman.h>
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    return bool(madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), huge_page) == 0)


@functools.cache
def _measured_choice() -> str:
    before = torch.get_float32_matmul_precision()
    try:
        return "medium" if _relative_error("medium") <= FLOAT32_RELATIVE_ERROR and _medium_is_faster() else "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def _relative_error(precision: str) -> float:
    left, right = _operands(256, 512, 256)
    truth = left.double() @ right.double()
    torch.set_float32_matmul_precision(precision)
    return float(((left @ right).double() - truth).norm() / truth.norm())


def _medium_is_faster() -> bool:
    left, right = _operands(384, 768, 384)
    out = torch.empty(384, 384)
    best = {"highest": float("inf"), "medium": float("inf")}
    # Alternating, and the fastest of several: another process on the core can only slow a trial down.
    for _ in range(6):
        for precision in best:
            torch.set_float32_matmul_precision(precision)
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            best[precision] = min(best[precision], time.perf_counter() - started)
    return best["highest"] / best["medium"] >= WORTHWHILE_SPEEDUP


def _operands(rows: int, inner: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
