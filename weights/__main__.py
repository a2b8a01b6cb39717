import sys

from weights.cli import main

sys.exit(main())
