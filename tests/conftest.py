"""What holds for every test: no network, one thread, and the same examples each time.

The environment is set when pytest reads this file, before any test module imports torch or huggingface_hub, which
read these variables once. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", STREAMLIT_BROWSER_GATHER_USAGE_STATS="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on two busy cores are several times slower than one

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """A plugin may have imported torch before this file was read; then only this call reaches it."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
