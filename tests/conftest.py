"""Before anything imports torch: test programs run side by side, so each computes with one thread."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
