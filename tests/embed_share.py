"""A process that embeds a share, for the tests of several processes: `python -m tests.embed_share JSON`.

JSON: out (file or directory to write); directory (whether embed_to_directory, else embed_dataset); batch_size;
stop_after (embedder calls before this process is interrupted; a list, one for each rank, -1 = never); bad (row whose
embedding is not finite, -1 = none). Prints what it raised.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.test_embed import SPEC, Crops, odd_zeros
from visard import dist, embed
from visard.errors import UserError
from visard.runtime import Embedder


def main(options: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    embed.JOURNAL_SECONDS = 0.0
    dist.init(torch.device("cpu"))
    calls = {"left": options.get("stop_after", [-1, -1, -1])[dist.rank()]}
    crops = Crops()
    bad_image = torch.from_numpy(crops.image(options["bad"])) if options.get("bad", -1) >= 0 else None

    def forward(images: torch.Tensor) -> np.ndarray:
        if calls["left"] == 0:
            raise KeyboardInterrupt
        calls["left"] -= 1
        vectors = odd_zeros(images)
        if bad_image is not None:
            vectors[(images == bad_image).all(dim=(1, 2, 3)).numpy()] = np.nan
        return vectors

    embedder, out = Embedder(SPEC, forward), Path(options["out"])
    batch_size = options.get("batch_size", 5)
    try:
        if options["directory"]:
            embed.embed_to_directory(embedder, crops, out, "none", batch_size, "abc")
        else:
            found = embed.embed_dataset(embedder, crops, "none", batch_size, quiet=True)
            np.save(out.with_name(f"{out.name}.{dist.rank()}.npy"), found.vectors)
    except UserError as error:
        print(error)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        dist.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
