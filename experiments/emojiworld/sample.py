"""Record the sample that ships with the package: the default picture, small enough to travel.

python -m experiments.emojiworld.sample
"""

from __future__ import annotations

import tempfile

from probe.reading.sample import ARCHIVE, pack
from probe.running.recorder import record

ASKED = {
    "name": "sample",
    "prompt": "An astronaut scuba diving",
    "seed": 5,
    "steps": 20,
    "guidance_scale": 3,
    "decode_every": 4,
    "device": "cpu",
    "capture": {"branches": "both", "dtype": "sqrt_u8"},
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pack(record({**ASKED, "output": folder}).path)
    print(f"wrote {ARCHIVE} ({ARCHIVE.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
