"""`python -m vitreous_core.bench SUITE`: the same as `vitreous bench SUITE`."""

from __future__ import annotations

import sys

from .command import main

sys.exit(main())
