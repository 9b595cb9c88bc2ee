"""`python -m concordia.abi` writes `kernels/abi.h` anew, floor 1.

Owns: the place of the header. Promises: writes that file and nothing else. Called by whoever
changed a layout.
"""

from __future__ import annotations

import pathlib

from concordia import abi

if __name__ == "__main__":
    (pathlib.Path(abi.__file__).parents[1] / "kernels" / "abi.h").write_text(
        abi.header(), encoding="utf-8"
    )
