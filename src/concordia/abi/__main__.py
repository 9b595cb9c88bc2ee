"""`python -m concordia.abi` writes `kernels/abi.h` and `native/control.h` anew, floor 1.

Owns: the places of the headers. Promises: writes these files and nothing else. Called by whoever
changed a layout.
"""

from __future__ import annotations

import pathlib

from concordia import abi

if __name__ == "__main__":
    package = pathlib.Path(abi.__file__).parents[1]
    (package / "kernels" / "abi.h").write_text(abi.header(), encoding="utf-8")
    (package / "native" / "control.h").write_text(abi.control_header(), encoding="utf-8")
