"""GPU versions of the two pieces of a margin softmax that touch every class, in Triton.

`triton_pieces()` gives `visard.functional.softmax_pieces.Pieces`, to be put into
`visard.functional.softmax_chunked.Settings(pieces=..., keep=False)`. `softmax.py` is the side of the host: memory,
chunks, launches; `softmax_triton.py` has the kernels and is imported only when they are asked for, because Triton is an
optional dependency (`pip install 'visard[kernels]'`).
"""

from __future__ import annotations

from visard.kernels.softmax import Tiling, triton_pieces

__all__ = ["Tiling", "triton_pieces"]
