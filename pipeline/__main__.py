"""`python -m pipeline "a red balloon rises over the mountains at sunset"` writes the video to a file."""

from __future__ import annotations

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
