"""Compiles the kernels for GPUs that need not be there, for test_compile.py and by hand.

    python -m tests.kernels.ahead_of_time [--arch 80 90] [--case bf16 tf32 ...]

In: the launches that a forward and backward pass would make, recorded with small tensors on the CPU. Out, per kernel
and architecture, a line of JSON: shared memory, registers and spilled bytes (of Triton's own assembler), and which
matrix instructions there are. Not to be run with TRITON_INTERPRET=1: then there is nothing to compile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from visard.functional.margins import HardNegatives
from visard.functional.softmax_pieces import LogitGradient
from visard.functional.softmax_workspace import Negatives
from visard.kernels import softmax
from visard.kernels.softmax import Tiling

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


class Case(NamedTuple):
    """A problem whose kernels are compiled."""

    products: torch.dtype = torch.bfloat16
    tf32: bool = False
    images: int = 1024
    dim: int = 512
    settings: bool = False
    centres: int = 1
    tiling: Tiling | None = None


CASES = {
    "bf16": Case(),
    "tf32": Case(torch.float32, tf32=True),
    "float32": Case(torch.float32),
    "bf16-settings": Case(settings=True),
    "bf16-centres": Case(settings=True, centres=3),
    "bf16-small": Case(images=7, dim=130),
    "tf32-small": Case(torch.float32, tf32=True, images=33, dim=64),
    "float32-small": Case(torch.float32, images=1, dim=5, settings=True),
}


class Launch(NamedTuple):
    """One call of a kernel."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def recorded(case: Case) -> list[Launch]:
    """The launches of both passes; nothing is computed."""
    from visard.kernels import softmax_triton as kernels

    assert not kernels.INTERPRETED, "nothing is compiled with TRITON_INTERPRET=1"
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return self.record

        def record(self, *args: Any, **kwargs: Any) -> None:
            options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
            arguments = dict(zip(self.kernel.arg_names, args, strict=False))
            launches.append(Launch(self.kernel, {**arguments, **kwargs}, options))

    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    originals = {name: getattr(kernels, name) for name in names}
    precision, check = torch.get_float32_matmul_precision(), softmax._check_device
    try:
        for name in names:
            setattr(kernels, name, Recorder(originals[name]))
        softmax._check_device = lambda device: None
        torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
        _pass(case)
    finally:
        torch.set_float32_matmul_precision(precision)
        softmax._check_device = check
        for name in names:
            setattr(kernels, name, originals[name])
    return launches


def _pass(case: Case) -> None:
    pieces = softmax.triton_pieces(tiling=case.tiling)
    per_image = torch.zeros(case.images)
    index_N = torch.zeros(case.images, dtype=torch.int64)
    classes = 1024
    n = Negatives(
        unit_ND=torch.zeros(case.images, case.dim),
        weight_RD=torch.empty(classes * case.centres, case.dim),
        sampled_C=torch.arange(classes) if case.settings else None,
        centres=case.centres,
        own_class_N=index_N,
        own_row_N=index_N,
        scale=64.0,
        hard=HardNegatives(per_image, torch.tensor(0.5)) if case.settings else None,
        ignored_C=torch.zeros(classes, dtype=torch.bool) if case.settings else None,
        conflict_cos=0.9 if case.settings else None,
        products=case.products,
    )
    pieces.sums(n, None)
    gradient = LogitGradient(per_image, per_image, per_image, per_image)
    weight_grad = torch.empty_like(n.weight_RD)
    pieces.gradients(n, gradient, None, torch.zeros_like(n.unit_ND), weight_grad, case.settings)


def compiled(launch: Launch, arch: int) -> dict[str, Any]:
    """What the compiler makes of a launch for compute capability `arch` / 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type(value)
        if isinstance(value, torch.Tensor) or (special and isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    started = time.perf_counter()
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    ptx = binary.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__.removesuffix("_kernel"),
        "arch": arch,
        "shared_kb": round(binary.metadata.shared / 1024, 1),
        "warps": binary.metadata.num_warps,
        **_assembled(ptx, arch),
        "wgmma": "wgmma.mma_async" in ptx,
        "mma": "mma.sync" in ptx,
        "async_copy": "cp.async" in ptx,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        names = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.int32: "i32"}
        names |= {torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1"}
        return "*" + names[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def _assembled(ptx: str, arch: int) -> dict[str, int]:
    """Registers of a thread and bytes that it spills, from the assembler that comes with Triton."""
    from triton.backends.nvidia.compiler import get_ptxas

    assembler = get_ptxas(arch).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        name = re.search(r"\.target (\w+)", ptx)
        assert name
        command = [assembler, "-v", f"--gpu-name={name[1]}", str(file), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spilled, said
    assert registers, said
    return {"registers": int(registers[1]), "spilled_bytes": int(spilled[1])}


def rows(cases: list[str], archs: list[int]) -> Iterator[dict[str, Any]]:
    """One row per kernel, case and architecture."""
    for name in cases:
        seen = set()
        for launch in recorded(CASES[name]):
            if launch.kernel in seen:
                continue
            seen.add(launch.kernel)
            for arch in archs:
                yield {"case": name, **compiled(launch, arch)}


def main(arguments: list[str]) -> None:
    """Prints the rows as they come."""
    parser = argparse.ArgumentParser(description="compile the kernels without a GPU")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    chosen = parser.parse_args(arguments)
    for row in rows(chosen.case, chosen.arch):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
