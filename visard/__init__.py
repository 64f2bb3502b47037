"""visard: train, distil, clean data for, search, evaluate and deploy large-scale (masked) face-recognition models.

`visard.load(path)(crops)` embeds aligned uint8 crops with a run, a model folder or an .onnx file; everything else is
imported from the module that owns it, in the order of the data path: data -> backbones -> heads -> training ->
protocols.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visard.runtime import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `visard --help` and the configuration never pay for importing torch.
    if name == "load":
        from visard.runtime import load

        return load
    raise AttributeError(f"module 'visard' has no attribute {name!r}")
