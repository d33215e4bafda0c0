"""`python -m mlsae` is the command line."""

import sys

from mlsae.cli import main

sys.exit(main())
