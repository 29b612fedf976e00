"""How the crash tests are run: CRASH_SEED=n gives a run again, CRASH_STATES=all leaves nothing out."""

import os
import random
from collections import Counter

from losses import ALL, Effort

SEED = int(os.environ.get("CRASH_SEED") or random.SystemRandom().randrange(1 << 32))
#: What was tried, of what how much.
total: Counter[str] = Counter()

IS_LONG = os.environ.get("CRASH_STATES") == "all"
EFFORT = ALL if IS_LONG else Effort()
#: Of the places where another process may come between, those that are tried.
ORDER_SHARE = 1.0 if IS_LONG else 0.4
