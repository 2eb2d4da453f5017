"""Shared by all tests."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("shared", deadline=None)  # on shared cores, how long one example takes says nothing of it
settings.load_profile("shared")
