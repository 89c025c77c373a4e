"""Tell whether two versions of this code record the same bits, in eight experiments.

python -m benchmarks.bits record FOLDER     # by the version before
python -m benchmarks.bits compare FOLDER    # by the version after: records again, and compares
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probe.proof.checks import variables
from probe.reading.compare import NEW_EACH_TIME
from probe.reading.recording import Run, open_run
from probe.running.recorder import record, record_noising

PICTURE = Path(__file__).parent.parent / "experiments" / "fox-and-penguin.png"
MASKS = PICTURE.with_name("fox-and-penguin-masks.npz")
RICH: dict[str, Any] = {
    "self_attention": ["8x8"],
    "counterfactual": ["*"],
    "activations": ["unet.mid_block", "vae.decoder.mid_block"],
}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "default": {"steps": 6, "decode_every": 3, "capture": {**RICH, "steps": "::2"}},
    "queries": {"steps": 4, "capture": {"attention": "queries", "dtype": "float32"}},
    "summary": {"steps": 4, "scheduler": "DPM++2M", "capture": {"attention": "summary"}},
    "both-branches": {
        "steps": 4,
        "capture": {"branches": "both", "tokens": "all", "dtype": "sqrt_u8"},
    },
    "negative-prompt": {"steps": 4, "negative_prompt": "a fox", "guidance_rescale": 0.7},
    "two-images": {
        "steps": 4,
        "images": 2,
        "height": 96,
        "width": 160,
        "scheduler": "EulerAncestral",
    },
    "image-to-image": {"steps": 8, "image": str(PICTURE), "strength": 0.6, "decode_every": 2},
}


def record_all(folder: Path) -> dict[str, Run]:
    """Record the eight, each with its name. A recording that is there already is taken as it is."""
    common = {"output": str(folder), "progress": False}
    made = {}
    for name, fields in EXPERIMENTS.items():
        made[name] = record(
            {"prompt": "An astronaut scuba diving", "name": name, **fields}, **common
        )
    masks = dict(np.load(MASKS))
    asked = {"name": "noising", "timesteps": "200:900:300", "noises": 2, "sheet": False}
    made["noising"] = record_noising(PICTURE, "a fox and a penguin", masks, **asked, **common)
    return made


def differences(one: Run, other: Run) -> tuple[int, list[str]]:
    """Return how many variables both have, and the names of those whose bits differ.

    Measured times are left out.
    """
    here, there = (dict(variables(run)) for run in (one, other))
    shared = [
        path for path in here.keys() & there.keys() if path.split("/")[0] not in NEW_EACH_TIME
    ]
    unlike = []
    for path in sorted(shared):
        a, b = here[path].values, there[path].values
        same = np.array_equal(a, b) if a.dtype.kind in "OTU" else a.tobytes() == b.tobytes()
        if (
            a.dtype != b.dtype
            or a.shape != b.shape
            or here[path].dims != there[path].dims
            or not same
        ):
            unlike.append(path)
    return len(shared), unlike


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "compare"):
        print(__doc__)
        return 2
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    if sys.argv[1] == "record":
        record_all(folder)
        return 0
    found = 0
    with tempfile.TemporaryDirectory() as new:
        for name, run in record_all(Path(new)).items():
            before = open_run(name, folder)
            count, unlike = differences(before, run)
            apart = sorted(dict(variables(before)).keys() ^ dict(variables(run)).keys())
            found += len(unlike)
            print(
                f"{name:16} {count:3} variables, {len(unlike)} differ "
                f"{', '.join(unlike)}{f'; in one only: {chr(32).join(apart)}' if apart else ''}"
            )
    print("the same bits" if not found else f"{found} variables differ")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
