"""`PATH#PART`: one part or reading of what lies at PATH, such as a list's `#train`. No heavy import.

In: a data source as a user writes it. Out: the path and the part.
"""

from __future__ import annotations

import os

MADE = ("rendered:", "strokes:")
"""What sources begin with that are made, not read."""


def split_part(source: str) -> tuple[str, str]:
    """(PATH, PART) where `PATH#PART` names a part of something that exists; otherwise the source as it is, and ""."""
    path, _, part = source.rpartition("#")
    return (path, part) if path and part and not os.path.exists(source) and os.path.exists(path) else (source, "")
