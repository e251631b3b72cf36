"""Runs the command: `python -m lit_lipschitz`."""

import sys

from lit_lipschitz.cli.main import main  # noqa: TID251

if __name__ == "__main__":
    sys.exit(main())
