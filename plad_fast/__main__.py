"""`python -m plad_fast`, which is `plad-fast`."""

import sys

from plad_fast.cli import main

sys.exit(main())
