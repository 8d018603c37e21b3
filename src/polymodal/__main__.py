"""``python -m polymodal`` is the command line."""

import sys

from polymodal.cli import main

sys.exit(main())
