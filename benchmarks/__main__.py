"""`python -m benchmarks`: how fast the embedded model, or another one, makes video here."""

import sys

from benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
