"""``python -m pantarhei``: the command line."""

import sys

from pantarhei.cli import main

sys.exit(main())
