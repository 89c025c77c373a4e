"""Measure what recording costs, by command. README.md in this folder has the tables.

No test depends on them. Every library is pinned to one thread here, before torch is imported: two
threads on two busy cores are slower than one.
"""

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "BLOSC_NTHREADS"), "1"))
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    DIFFUSERS_VERBOSITY="error",
)
