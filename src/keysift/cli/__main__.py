"""``python -m keysift.cli``: the command line where the ``keysift`` script is not on the path."""

import sys

from keysift.cli import main

sys.exit(main())
