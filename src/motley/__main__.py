"""`python -m motley` equals `motley`."""

import sys

from motley.cli import main

sys.exit(main())
