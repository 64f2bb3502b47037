"""What takes the place of an image that cannot be read: the next one that can.

In: a data set and indices. Out: indices of readable images, which depend on the index alone: not on the batch, the
rank, the number of processes or what was read before. So a run with damaged images is as repeatable as any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from visard.errors import FormatError

if TYPE_CHECKING:
    from visard.data.dataset import FaceDataset
    from visard.records import Int64Array

IN_A_ROW = 1000
"""Broken images one after another at which it is no use to go on."""


def readable(dataset: FaceDataset, indices: Int64Array) -> tuple[Int64Array, list[FormatError]]:
    """Replaces each index whose image is broken by the next good one, from the last image on to the first.

    Args:
        indices: (n,) int64.

    Returns:
        indices: (n,) int64, where `image` gives an image.
        problems: one for each image that was replaced.

    Raises:
        FormatError: the first problem of a run of `IN_A_ROW` broken images.
    """
    chosen = np.array(indices, np.int64)
    problems: list[FormatError] = []
    for place, index in enumerate(chosen.tolist()):
        first: FormatError | None = None
        for step in range(min(len(dataset), IN_A_ROW)):
            candidate = (index + step) % len(dataset)
            try:
                dataset.image(candidate)
            except FormatError as error:
                first = first or error
                continue
            chosen[place] = candidate
            break
        else:
            assert first is not None
            raise first
        if first is not None:
            problems.append(first)
    return chosen, problems
