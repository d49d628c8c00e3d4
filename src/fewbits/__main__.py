"""``python -m fewbits`` is the command line."""

import sys

from fewbits.cli import main

sys.exit(main())
