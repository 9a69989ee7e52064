"""Tests with bitsandbytes, which scripts/test runs in processes of their own.

It makes every start of transformers 2 s slower, so that the other tests do without it.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob: list[str] = [] if importlib.util.find_spec("bitsandbytes") else ["test_*.py"]
