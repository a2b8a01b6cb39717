"""One file from the Hugging Face Hub: fetched piece by piece, gone on with after any end, and checked.

`hf_hub_download` begins again from nothing when it is called again; a file of 11 GB must not. So the two halves of it
are used by themselves here: the question what the file is, and the transfer, which can begin anywhere in it. The plain
HTTP transfer is used for every file: Xet's own has no beginning but the first byte.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import http_get
from tqdm import tqdm

from pipeline.errors import DownloadError, WeightsError
from weights.manifest import Part, RemoteFile
from weights.progress import Meter

PARTIAL = ".part"
HASH_CHUNK = 1 << 22
SHA256 = re.compile(r"[0-9a-f]{64}")


class Resumable(Exception):
    """Mixed into errors after which the same download may be begun again, and goes on from what has come.

    Their sentences do not say how: on a command line that is a command, on a page a button.
    """


class BrokenOff(Resumable, DownloadError):
    """A download ended early."""


class WrongFile(Resumable, WeightsError):
    """What came is another file than the one that is meant, and was deleted."""


KEPT = "What has come is kept."


@dataclass(frozen=True)
class RemoteState:
    """What the hub says of a file."""

    bytes: int
    sha256: str | None
    """It names that of large files, as their ETag; small ones have another one there."""


def remote_state(part: Part, file: RemoteFile, expected_bytes: int | None) -> RemoteState:
    """Ask the hub for a file, before any of it is fetched.

    Raises:
        DownloadError: it cannot be asked, or does not have the file.
        WeightsError: its file has another size than `expected_bytes`.
    """
    with _explained(part, file):
        metadata = huggingface_hub.get_hf_file_metadata(_url(part, file))
    if metadata.commit_hash not in (None, part.revision):
        raise DownloadError(
            f"The hub answered with another revision of {part.repository} than the one that was asked for "
            f"({part.revision[:12]}). Try again later."
        )
    if metadata.size is None:
        raise DownloadError(f"The hub does not say how large {file.name} of {part.repository} is. Try again later.")
    if expected_bytes is not None and metadata.size != expected_bytes:
        whose = "the manifest means" if file.bytes else "was downloaded before"
        raise WeightsError(
            f"{file.name} of {part.repository} has {metadata.size:,} bytes on the hub, but should have "
            f"{expected_bytes:,}. It is another file than {whose}, so it is not downloaded."
        )
    tag = (metadata.etag or "").lower()
    return RemoteState(metadata.size, tag if SHA256.fullmatch(tag) else None)


def fetch(part: Part, file: RemoteFile, size: int, folder: Path, meter: Meter) -> Path:
    """The file, complete, in `folder`. Goes on where an earlier call was cut off.

    Raises:
        BrokenOff: with what has come so far kept.
        DownloadError: the hub does not give it.
    """
    target = folder / file.name
    if target.is_file() and target.stat().st_size == size:
        meter.skip(size)
        return target
    partial = folder / (file.name + PARTIAL)
    with _explained(part, file):
        folder.mkdir(parents=True, exist_ok=True)
        partial.touch()
        with _opened(partial) as stream:
            done = stream.seek(0, 2)
            if done > size:  # of another file; nothing of it can be used
                done = stream.seek(0)
                stream.truncate()
            meter.skip(done)
            http_get(
                _url(part, file),
                stream,
                resume_size=done,
                headers=huggingface_hub.utils.build_hf_headers() | {"Accept-Encoding": "identity"},
                expected_size=size,
                tqdm_class=_silent_bar(meter, done),
            )
        partial.replace(target)
    return target


def sha256_of(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """Hash of a file, read in pieces.

    Raises:
        WeightsError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(HASH_CHUNK):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise WeightsError(
            f"{path.name} cannot be read ({error.strerror or error}). The disk may be failing: remove the model, and "
            "download it again to another one if need be."
        ) from error
    return digest.hexdigest()


def _url(part: Part, file: RemoteFile) -> str:
    return huggingface_hub.hf_hub_url(part.repository, file.path, revision=part.revision)


def _opened(path: Path) -> BinaryIO:
    # Not "ab": there, what a server sends anew from its start could not be put in place of what came before.
    return path.open("r+b")


def _silent_bar(meter: Meter, done: int) -> type[tqdm]:
    class SilentBar(tqdm):
        """Shows nothing and passes the count on: one bar for all files is drawn elsewhere."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            meter.skip(int(kwargs.get("initial") or 0) - done)  # a server may insist on beginning anew
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            meter.advance(int(n or 0))

    return SilentBar


@contextmanager
def _explained(part: Part, file: RemoteFile) -> Iterator[None]:
    """Whatever the network, the hub or the disk have to say, in one sentence with what to do."""
    what = f"{file.name} of {part.repository}"
    try:
        yield
    except (DownloadError, WeightsError):
        raise
    except hub_errors.OfflineModeIsEnabled as error:
        raise BrokenOff(f"{what} is not here and HF_HUB_OFFLINE is set. Unset it. {KEPT}") from error
    except hub_errors.GatedRepoError as error:
        raise DownloadError(
            f"{part.repository} wants its terms accepted first. Do that at https://huggingface.co/{part.repository}, "
            "then log in with: hf auth login"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"{part.repository} no longer has the revision {part.revision[:12]}, so {file.name} cannot be fetched."
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"The hub has no repository {part.repository} for you. If it is private, log in with: hf auth login"
        ) from error
    except hub_errors.EntryNotFoundError as error:
        raise DownloadError(f"{what} does not exist at revision {part.revision[:12]}.") from error
    except hub_errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "no")
        answered = f"The hub answered {status} when asked for {what}."
        if status in (401, 403):
            raise DownloadError(f"{answered} Log in with: hf auth login") from error
        raise BrokenOff(f"{answered} {KEPT}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BrokenOff(f"The disk is full in the middle of {what}. Free some space. {KEPT}") from error
        if error.errno is not None:
            raise BrokenOff(f"{what} cannot be written ({error.strerror}). {KEPT}") from error
        raise BrokenOff(f"{what} broke off. {KEPT}") from error  # the library's check of the length
    except Exception as error:  # the HTTP library's: its name is another one from release to release
        if not type(error).__module__.startswith(("http", "requests")):
            raise
        raise BrokenOff(f"The connection broke ({type(error).__name__}) at {what}. {KEPT}") from error
