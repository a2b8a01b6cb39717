"""sha256 of a model's weight files, one by one and of all together, read once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileHashes:
    """Hashes in hexadecimal."""

    together: str
    """SHA-256 of the files' bytes, one file after the other."""
    single: dict[str, str]
    """File name -> that of the file alone."""


def weight_files(part: Path) -> list[Path]:
    """The weight files in a part's folder, in the order in which they are hashed together."""
    return sorted(part.glob("*.safetensors"))


def weight_bytes(part: Path) -> int:
    """Bytes of those files. A link that leads nowhere counts as nothing: loading says what is wrong with it."""
    return sum(file.stat().st_size for file in weight_files(part) if file.exists())


def hash_files(paths: Iterable[Path]) -> FileHashes:
    """Read files in the order given. Raises `OSError` for one that cannot be read."""
    together, single = hashlib.sha256(), {}
    for path in paths:
        own = hashlib.sha256() if single else together  # all together are, after the first, the first alone
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                own.update(chunk)
                if own is not together:
                    together.update(chunk)
        single[path.name] = own.hexdigest()
    return FileHashes(together.hexdigest(), single)
