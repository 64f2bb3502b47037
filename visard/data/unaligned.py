"""Photographs where aligned crops are expected: they can be resized and trained on, and nothing good comes of it.

In: an opened data set. Out: a remark, where its images look like photographs. Nothing is decoded.
"""

from __future__ import annotations

import numpy as np

from visard.data.dataset import FaceDataset
from visard.data.decode import image_size
from visard.data.formats.encoded import EncodedDataset
from visard.errors import FormatError

LOOKED_AT = 64
"""Images whose headers are read, spread over the data set."""


def unaligned_remark(dataset: FaceDataset, source: str) -> str | None:
    """One line if some images are not square or differ in size, as crops by one template never do.

    Args:
        dataset: whatever `open_dataset` gave; rendered and joined sets pass.
        source: what it was opened from.
    """
    if not isinstance(dataset, EncodedDataset):
        return None
    sizes: dict[str, tuple[int, int]] = {}
    for index in np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(np.int64)).tolist():
        try:
            sizes[dataset.ids[index]] = image_size(dataset.encoded(index), *dataset.where(index))
        except FormatError:  # broken images are the loader's matter
            continue
    oblong = [(image_id, size) for image_id, size in sizes.items() if size[0] != size[1]]
    if oblong:
        image_id, (width, height) = oblong[0]
        why = f"{len(oblong)} of {len(sizes)} images looked at are not square (such as {image_id}, {width}x{height} px)"
    elif len(set(sizes.values())) > 1:
        widths = [width for width, _ in sizes.values()]
        why = f"its images have different sizes ({min(widths)} to {max(widths)} px)"
    else:
        return None
    return (
        f"{source}: {why}: these seem to be photographs, not aligned crops, and are only squeezed to size; "
        f"`visard prepare {source} OUT` makes aligned crops"
    )
