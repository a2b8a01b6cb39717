"""`python -m pipeline "a red balloon rises over the mountains at sunset"` writes the video to a file.

A first word that is one of `COMMANDS` does something else; each is a module with a `main(argv)` of its own.
"""

from __future__ import annotations

import sys
from importlib import import_module

from pipeline.cli import main as make_video

COMMANDS = {"compare": "pipeline.compare_cli", "doctor": "pipeline.doctor", "enhance": "prompting.cli"}
"""First word of the command line -> the module that answers it."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in COMMANDS:
        return import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    return make_video(arguments)


if __name__ == "__main__":
    sys.exit(main())
