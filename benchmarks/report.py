"""`python -m benchmarks.report` puts the results of `benchmarks/results` into README, as tables and curves."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, NAMES, as_tables, read_all
from pipeline.cli import EXIT_BAD_INPUT, SentenceParser, say
from pipeline.errors import InvalidRequest, SelfForcingError
from training.curves import Panel, draw
from training.document import put_into

ROOT = Path(__file__).resolve().parent.parent
MARKS = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
PICTURE = Path("docs/images/benchmarks.svg")
NOTHING = "Nothing has been measured yet with this version: the first command does it, the second one writes it here."


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report. Returns 0, or 2 with a sentence."""
    parser = SentenceParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="FOLDER", help="default: benchmarks/results")
    parser.add_argument(
        "--document", type=Path, default=ROOT / "README.md", metavar="FILE.md", help="default: README.md"
    )
    try:
        options = parser.parse_args(argv)
        say(write_report(options.results, options.document))
    except SelfForcingError as error:
        say(str(error))
        return EXIT_BAD_INPUT
    return 0


def write_report(results: Path, document: Path) -> str:
    """Put the newest result of each model on each machine between the marks of a document.

    Returns:
        What was done, in a sentence.

    Raises:
        SelfForcingError: a result cannot be read, or the document has no such place or cannot be written.
    """
    found = newest(read_all(results))
    picture = document.parent / PICTURE
    try:
        text = as_markdown(found)
        if panels := curves(found):
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_text(draw(*panels, "latent frames"), encoding="utf-8")
            text += f"\n\n![Time of a block by the length of the video]({PICTURE.as_posix()})"
        put_into(document, text, *MARKS)
    except OSError as error:
        raise InvalidRequest(f"{document} cannot be written ({error.strerror}).") from error
    return f"{len(found)} results are now in {document}."


def newest(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last of the results of each model on each machine."""
    last = {(result["model"]["name"], device_of(result)): result for result in results}
    return list(last.values())


def device_of(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    if machine["gpu"]:
        return machine["gpu"]["name"]
    return f"{machine['processor']}, {machine['usable_processors']} processors, {machine['cpu_capability']}"


def as_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Tables of all results; a sentence where there is none."""
    if not results:
        return NOTHING
    parts = []
    for result in results:
        parts.append(
            f"**{result['model']['name']}** on {device_of(result)}; torch {result['machine']['packages']['torch']}, "
            f"measured on {result['made'][:10]}."
        )
        parts += [f"{title}:\n\n{_table(rows)}" for title, rows in as_tables(result)]
        parts += [
            f"{NAMES[name][:1].upper()}{NAMES[name][1:]}: {' '.join(reasons)}"
            for name, reasons in result["why_null"].items()
            if name in NAMES
        ]
    return "\n\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *others = rows
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *others))


def curves(results: Sequence[Mapping[str, Any]]) -> tuple[list[Panel], list[float]] | None:
    """Milliseconds of a block by latent frames, of the first result that has them."""
    for result in results:
        if measured := result["parts"].get("length"):
            titles = {"window": "with the model's window", "everything": "every block sees all before it"}
            series = {
                titles[name]: [[1000 * value for value in seconds]]
                for name, seconds in measured["transformer_seconds"].items()
            }
            title = f"Transformer, milliseconds a block: {result['model']['name']}"
            return [Panel(title, series)], measured["latent_frames"]
    return None


if __name__ == "__main__":
    sys.exit(main())
