"""`python -m tests.parity FILE...`: compare this code with tensors recorded from the authors' code.

A file's case is known by its name; a `.pt` is loaded with the `.json` beside it and must reproduce the case-3 file
beside it. Prints one line a case and exits with 1 if any fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.parity import CASES, check_file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=f"one of {', '.join(CASES)}")
    parser.add_argument("--verbose", action="store_true", help="a line for every compared tensor")
    options = parser.parse_args(argv)
    failed = 0
    for path in options.files:
        try:
            rows = check_file(path)
            if not rows:
                raise ValueError("the file holds nothing that could be compared")
        except Exception as error:  # noqa: BLE001 - a case that cannot be run has failed, whatever the reason
            print(f"{path.stem}: FAIL, {type(error).__name__}: {error}")
            failed += 1
            continue
        # The row that comes nearest to its tolerance, or is furthest beyond it, speaks for the case.
        worst = max(rows, key=lambda row: (not row.ok, row.error / row.tolerance if row.tolerance else row.error))
        ok = all(row.ok for row in rows)
        failed += not ok
        print(
            f"{path.stem}: largest error {worst.error:.3g} ({worst.name}), tolerance {worst.tolerance:.3g}, "
            f"{len(rows)} tensors: {'pass' if ok else 'FAIL'}"
        )
        if options.verbose:
            for row in rows:
                print(f"    {row.name}: {row.error:.3g} of {row.tolerance:.3g} {'' if row.ok else 'FAIL'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
