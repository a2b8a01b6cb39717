"""`python -m weights`: list, info, download, verify, convert and remove published checkpoints."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.cli import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, SentenceParser, say
from pipeline.errors import InvalidRequest, SelfForcingError, WeightsError
from pipeline.process import quiet_libraries, terminate_like_interrupt
from weights.hub import KEPT, Resumable
from weights.install import download, verify
from weights.manifest import DTYPES, MANIFEST_FILE, Manifest, Model, Part, load_manifest
from weights.progress import Listener, Progress, about, gigabytes
from weights.store import Store, StoreInUse

DEFAULT_CONFIG = MANIFEST_FILE.parent / "configs" / "wan2.1_t2v_1.3b.json"
IN_WORDS = {"present": "here", "partial": "partly here", "absent": "not here"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 (failed), 2 (bad input or bad files) or 130 (Ctrl-C)."""
    as_json, downloads = False, False
    argv = sys.argv[1:] if argv is None else argv
    same = f"`python -m weights {shlex.join(argv)}`"
    try:
        options = parse(argv)
        as_json, downloads = options.json, options.command is download_model
        quiet_libraries(options.verbose)
        terminate_like_interrupt()
        options.command(options)
        return 0
    except KeyboardInterrupt:
        again = same if downloads else None
        return _fail(f"Stopped. {KEPT}" if downloads else "Stopped.", EXIT_INTERRUPTED, as_json, again)
    except (InvalidRequest, WeightsError) as error:
        return _fail(str(error), EXIT_BAD_INPUT, as_json, same if isinstance(error, Resumable) else None)
    except SelfForcingError as error:
        return _fail(str(error), EXIT_FAILED, as_json, same if isinstance(error, Resumable) else None)


def _fail(message: str, code: int, as_json: bool, again: str | None) -> int:
    """Say what went wrong.

    Args:
        again: the command that goes on from there, if there is one. JSON only tells that there is one: whoever reads
            that for a user may have a button for it.
    """
    if as_json:
        _print({"event": "error", "message": message, "code": code, "resumable": again is not None})
    else:
        say(message if again is None else f"{message} Go on with {again}.")
    return code


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of text")
    common.add_argument("--verbose", action="store_true", help="show the libraries' warnings")
    stored = argparse.ArgumentParser(add_help=False, parents=[common])
    stored.add_argument(
        "--home",
        type=Path,
        metavar="FOLDER",
        help="of the downloads (default: $SELF_FORCING_WEIGHTS or weights/models)",
    )
    stored.add_argument("--manifest", type=Path, default=MANIFEST_FILE, metavar="FILE", help="another list of models")
    chosen = argparse.ArgumentParser(add_help=False, parents=[stored])
    chosen.add_argument("id", help="a name from `python -m weights list`")
    encoder = argparse.ArgumentParser(add_help=False)
    encoder.add_argument(
        "--text-encoder", metavar="ID", help="another text encoder, e.g. umt5-xxl-fp8: a smaller download, rounded"
    )

    parser = SentenceParser(
        prog="python -m weights", description="Published checkpoints for this pipeline.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=SentenceParser)

    def add(name: str, command: Callable[[argparse.Namespace], None], *parents: Any, help: str) -> SentenceParser:
        sub = commands.add_parser(name, parents=list(parents), help=help, allow_abbrev=False)
        sub.set_defaults(command=command)
        return sub

    add("list", list_models, stored, help="what there is, and what of it is here")
    add("info", show_model, chosen, encoder, help="files, sizes, licence and settings of one model")
    add("download", download_model, chosen, encoder, help="get a model; goes on where it stopped")
    add("verify", verify_model, chosen, encoder, help="compare every file with its hash")
    add("remove", remove_model, chosen, help="delete a model and the parts that no other one needs")
    convert = add("convert", convert_file, common, help="make a transformer folder from a checkpoint file")
    convert.add_argument("file", type=Path, help=".pt, .pth or .safetensors")
    convert.add_argument("out", type=Path, help="folder to make")
    convert.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help="in the published naming (default: that of Wan2.1 1.3B)"
    )
    convert.add_argument("--key", help="entry of the checkpoint (default: generator_ema, generator, model or the file)")
    convert.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as in the file)")
    return parser.parse_args(argv)


# ---- commands


def list_models(options: argparse.Namespace) -> None:
    manifest, store = load_manifest(options.manifest), Store(options.home)
    rows = [_summary(store.as_installed(model, manifest), store) for model in manifest.models.values()]
    parts = [model.transformer for model in manifest.models.values()]
    if options.json:
        _print(rows)
        return
    width = max(len(row["id"]) for row in rows) if rows else 0
    for row, part in zip(rows, parts, strict=True):
        size = _size_of(part, manifest)
        _write(f"{row['id']:<{width}}  {IN_WORDS[row['state']]:<11}  {size:>14}  {row['title']} ({row['licence']})")
    _write("\nSizes are without the parts that all share. `python -m weights info ID` tells more.")


def show_model(options: argparse.Namespace) -> None:
    manifest, model, store = load_manifest(options.manifest), _chosen(options), Store(options.home)
    parts = [
        {
            "id": part.id,
            "kind": part.kind,
            "repository": part.repository,
            "revision": part.revision,
            "files": [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in part.files],
            "licence": part.licence.name,
            "terms": part.licence.terms,
            "here": store.has_part(part),
        }
        for part in model.parts
    ]
    about = _summary(model, store) | {"parts": parts, "settings": dict(model.settings)}
    if options.json:
        _print(about)
        return
    _write(f"{model.title}: {model.note} It is {IN_WORDS[about['state']]}.")
    for part in model.parts:
        size = _size_of(part, manifest)
        here = "here" if store.has_part(part) else "to download"
        _write(f"\n{part.title} ({part.kind}): {size}, {here}")
        _write(f"  {part.repository} at {part.revision}")
        for file in part.files:
            _write(f"  {file.path}  sha256 {file.sha256 or 'not published: recorded at the first download'}")
        _write(f"  Licence {part.licence.name}: {part.licence.terms}")
    _write("\nSettings: " + ", ".join(f"{name} {value}" for name, value in model.settings.items() if name != "name"))


def download_model(options: argparse.Namespace) -> None:
    manifest, store, model = load_manifest(options.manifest), Store(options.home), _chosen(options)
    for licence, titles in _licences(model).items():
        line = f"{', '.join(titles)}: {licence.name}. {licence.terms}"
        _print({"event": "licence", "text": line}) if options.json else say(line)
    with _shown(options.json) as listener:
        told: list[str] = []
        folder = download(model, store, listener, told.append)
        # A text encoder that was exchanged. Who has the store now drops it in turn, or the next download does.
        with suppress(StoreInUse), store.locked():
            store.drop(manifest.parts.values(), [model, *_others(model, manifest, store)])
    for line in told:
        _print({"event": "note", "text": line}) if options.json else say(line)
    if options.json:
        _print({"event": "done", "folder": str(folder)})
    else:
        _write(f"{model.title} is here. Try it with: python app.py --model {folder}")


def verify_model(options: argparse.Namespace) -> None:
    model, store = _chosen(options), Store(options.home)
    with _shown(options.json) as listener:
        count = verify(model, store, listener, _download_command(options))
    _print({"event": "done", "files": count}) if options.json else _write(f"All {count} files are as they came.")


def remove_model(options: argparse.Namespace) -> None:
    manifest, store = load_manifest(options.manifest), Store(options.home)
    model = store.as_installed(manifest.model(options.id), manifest)
    with store.locked():
        there = store.presence(model) != "absent"
        freed = store.remove_model(model, manifest.parts.values(), _others(model, manifest, store))
    if options.json:
        _print({"event": "done", "freed": freed})
    elif there or freed:
        _write(f"Removed; {gigabytes(freed)} are free again.")
    else:
        _write(f"{model.title} is not here: there was nothing to remove.")


def convert_file(options: argparse.Namespace) -> None:
    if not options.file.is_file():
        raise InvalidRequest(f"There is no file {options.file.name!r}.")
    import torch

    from weights.convert import convert_transformer

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    convert_transformer(options.file, options.out, options.config, options.key, dtype)
    _print({"event": "done", "folder": str(options.out)}) if options.json else _write(
        f"{options.out} is a transformer."
    )


# ---- helpers


def _download_command(options: argparse.Namespace) -> str:
    """That puts right what this command was asked about, in the same place."""
    places = (("--home", options.home, None), ("--manifest", options.manifest, MANIFEST_FILE))
    given = [f"{flag} {shlex.quote(str(value))}" for flag, value, usual in places if value != usual]
    return " ".join(["python -m weights download", options.id, *given])


def _chosen(options: argparse.Namespace) -> Model:
    manifest = load_manifest(options.manifest)
    model = Store(options.home).as_installed(manifest.model(options.id), manifest)
    return model.with_part(manifest.part(options.text_encoder, "text_encoder")) if options.text_encoder else model


def _others(model: Model, manifest: Manifest, store: Store) -> list[Model]:
    return [store.as_installed(other, manifest) for other in manifest.models.values() if other.id != model.id]


def _summary(model: Model, store: Store) -> dict[str, Any]:
    return {
        "id": model.id,
        "title": model.title,
        "note": model.note,
        "bytes": model.transformer.known_bytes,
        "licence": model.transformer.licence.name,
        "state": store.presence(model),
        "folder": str(store.model_folder(model)),
    }


def _size_of(part: Part, manifest: Manifest) -> str:
    """Of a download, in words."""
    if part.known_bytes is not None:
        return gigabytes(part.known_bytes)
    return "size unknown" if (likely := manifest.likely_bytes(part)) is None else about(likely)


def _licences(model: Model) -> dict[Any, list[str]]:
    by_licence: dict[Any, list[str]] = {}
    for part in model.parts:
        by_licence.setdefault(part.licence, []).append(part.title)
    return by_licence


class _shown:
    """Draws progress on the terminal, or prints it as one JSON object a line."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._drawn = False
        self._stage = ""

    def __enter__(self) -> Listener:
        return self._show

    def __exit__(self, *exc_info: object) -> None:
        if self._drawn:
            sys.stderr.write("\n")

    def _show(self, progress: Progress) -> None:
        if self._json:
            _print({"event": "progress", **progress.as_dict(), "share": round(progress.share, 4)})
        elif sys.stderr.isatty():
            bar = "█" * round(20 * progress.share)
            sys.stderr.write(f"\r\033[K[{bar:░<20}] {progress}")
            sys.stderr.flush()
            self._drawn = True
        elif progress.stage != self._stage:  # a log file wants lines, and few of them
            say(str(progress))
        self._stage = progress.stage


def _print(value: Any) -> None:
    _write(json.dumps(value, allow_nan=False))


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
