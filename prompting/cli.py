"""`python -m pipeline enhance "a balloon"`: a suggestion for a prompt on standard output, notes on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import (
    EMBEDDED_MODEL,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    SentenceParser,
    check_model_folder,
    exit_code,
    say,
)
from pipeline.config import MAX_VARIANT, checked_prompt, checked_variant
from pipeline.errors import InvalidRequest, OptionUnavailable, SelfForcingError
from pipeline.process import ignore_interrupts, leave_at_once, quiet_libraries, terminate_like_interrupt
from prompting.enhancer import Enhancer
from prompting.language import ENHANCER_HELP, LanguageEnhancer
from prompting.templates import TemplateEnhancer

MAX_SECONDS = 1800.0
"""Loading may mean a download here, and whoever waits can press Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, 1 (failed), 2 (bad input) or 130 (Ctrl-C)."""
    enhancer: Enhancer | None = None
    code = EXIT_FAILED
    try:
        options = parse(argv)
        quiet_libraries(options.verbose)
        prompt, variant = checked_prompt(options.prompt), checked_variant(options.variant)
        enhancer = pick(options)
        terminate_like_interrupt()
        suggestion = enhancer.enhance(prompt, variant)
        if options.json:
            sys.stdout.write(json.dumps({"text": suggestion.text, "notes": suggestion.notes}) + "\n")
        else:
            for note in suggestion.notes:
                say(note)
            sys.stdout.write(suggestion.text + "\n")
        code = 0
    except KeyboardInterrupt:
        ignore_interrupts()
        say("Stopped.")
        code = EXIT_INTERRUPTED
    except SelfForcingError as error:
        say(str(error))
        code = exit_code(error)
    if isinstance(enhancer, LanguageEnhancer) and not enhancer.close():
        # It is loading, which cannot be interrupted; torch aborts the process if the interpreter goes away under it.
        leave_at_once(code)
    return code


def pick(options: argparse.Namespace) -> Enhancer:
    """What the options ask for.

    Raises:
        InvalidRequest: they ask for templates and for a language model.
        OptionUnavailable: the model has no templates.
    """
    if options.enhancer is not None:
        if options.model is not None:
            raise InvalidRequest(
                "--model, whose templates are taken, and --enhancer, a language model, cannot go together. Leave one "
                "of them out."
            )
        return LanguageEnhancer(options.enhancer, max_seconds=MAX_SECONDS)
    folder = check_model_folder(EMBEDDED_MODEL if options.model is None else options.model)
    enhancer = TemplateEnhancer.from_folder(folder)
    if enhancer is None:
        raise OptionUnavailable(
            f"The model in {folder.name} has no templates for prompts. Pick a language model with --enhancer."
        )
    return enhancer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = SentenceParser(
        prog="python -m pipeline enhance",
        description="Suggest a longer prompt: from the templates of a small model, or by a language model.",
        allow_abbrev=False,
    )
    parser.add_argument("prompt", help="what the video is to show")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="model folder whose templates are taken (default: weights/embedded)",
    )
    parser.add_argument("--enhancer", metavar="FOLDER|NAME@REVISION", help=ENHANCER_HELP)
    parser.add_argument(
        "--variant", type=int, default=0, help=f"0 to {MAX_VARIANT}: another number, another suggestion (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with the text and the notes")
    parser.add_argument("--verbose", action="store_true", help="show warnings and the trace of an error")
    return parser.parse_args(argv)
