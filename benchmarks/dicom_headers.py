"""Does a DICOM file give the picture that its values mean, or one line that says why not?

    python benchmarks/dicom_headers.py [--count 2000] [--seed 0] [--quick]

Files are made up around the values that scanners write wrongly: bits stored and their place, noise
in the bits beside them, words in the wrong of two representations, decimal commas, tables and
palettes that state other bits than they hold, colours that are called otherwise than their stream
holds them, pixels that are not square. Each is read as EdgeKD reads it, and in float64 from what
was meant (`dicom_cases.py`). Exit 1 if a file raised anything but a line of words, was shown though
it cannot be read for certain, was refused though it can, or is off by more than a grey level.
"""

from __future__ import annotations

import collections
import re
import sys
import time

import numpy as np
from dicom_cases import Case, made
from workbench import arguments, keep

from edgekd.data import preprocess
from edgekd.records import EdgeKDError


def judged(case: Case) -> tuple[str, float, str]:
    """(what came of it, grey levels off at most, the line in the place of a picture)."""
    try:
        seen = np.asarray(preprocess.decode(case.data)).astype(float)
    except EdgeKDError as e:
        if "\n" in str(e) or "corrupt" in str(e):
            return "unclear", 0.0, str(e)
        fits = case.picture is None or case.optional
        return "refused" if fits else "refused wrongly", 0.0, str(e)
    except Exception as e:  # whatever it is, it is what is looked for
        return "traceback", 0.0, f"{type(e).__name__}: {e}"
    if case.picture is None:
        return "shown wrongly", 0.0, ""
    if seen.shape != case.picture.shape:
        return "off", 255.0, f"{seen.shape} for {case.picture.shape}"
    off = float(np.abs(seen - np.rint(case.picture)).max())
    return ("shown" if off <= 1 else "off"), off, ""


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--count", type=int, default=2000, help="files (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next have the next")
    given = parser.parse_args()
    found: collections.Counter[str] = collections.Counter()
    lines: collections.Counter[str] = collections.Counter()
    most, seconds = 0.0, 0.0
    for seed in range(given.seed, given.seed + (100 if given.quick else given.count)):
        case = made(seed)
        began = time.perf_counter()
        came, off, line = judged(case)
        seconds += time.perf_counter() - began
        found[came] += 1
        if came == "refused":
            lines[re.sub(r"\d+", "N", line)] += 1
        elif came == "shown":
            most = max(most, off)
        else:
            print(f"seed {seed}: {came} ({off:g} off) {line}: {'; '.join(case.what)}")
    figures = {
        "files": found.total(), "shown": found["shown"], "refused": found["refused"],
        "most_levels_off": most, "tracebacks": found["traceback"], "off": found["off"],
        "shown_wrongly": found["shown wrongly"], "refused_wrongly": found["refused wrongly"],
        "unclear_lines": found["unclear"], "ms_a_file": 1e3 * seconds / found.total(),
    }  # fmt: skip
    keep("dicom_headers", figures, [{"line": k, "files": n} for k, n in lines.most_common()],
         packages=("pydicom", "numpy", "pylibjpeg"), quick=given.quick)  # fmt: skip
    return 1 if found.total() > found["shown"] + found["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
