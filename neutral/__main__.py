"""`python -m neutral` is the command `neutral`."""

import sys

from neutral.cli import main

sys.exit(main())
