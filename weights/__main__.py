"""`python -m weights list` and so on."""

from __future__ import annotations

import sys

from huggingface_hub import constants

from weights.cli import main

PIECE_BYTES = 1 << 20
"""In the library's own pieces of 10 MB, a slow connection would tell of itself every ten seconds, and lose as much."""

if __name__ == "__main__":
    constants.DOWNLOAD_CHUNK_SIZE = PIECE_BYTES
    sys.exit(main())
