"""One lock for everything that loads weights by `from_pretrained`."""

from __future__ import annotations

import threading

LOAD_LOCK = threading.RLock()
"""Held around every `from_pretrained`: while it runs, torch's default dtype is another one for the whole process, and
two that overlap build tensors of the other one's dtype, or leave the wrong default behind."""
