"""How long does a newcomer wait for a first result, and how good is it?

    python benchmarks/time_to_result.py [--quick] [--only NAME ...] [--runs DIR]

`demo` is the commands of `make demo`; `brain_tumor_mri` and `cxr_pneumonia` are `edgekd distill -p
cpu --data SET` with no other option, then quantize, export, bench and explain, as the README has
them. Of each stage: seconds, and cores kept busy (CPU time of the process and its children over
seconds). The latency table of this machine is measured anew for each, as for a newcomer. About an
hour and a half on 2 cores, with nothing beside it; --quick (64 pixels, one epoch) writes no result.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from workbench import HERE, RUNS, arguments, data_folder, keep

from edgekd.records import Artifact, Fidelity

SETS = ("brain_tumor_mri", "cxr_pneumonia")
LINE = ("distill -p cpu", "quantize", "export --format openvino", "bench", "explain")


def demo() -> list[str]:
    """The commands of `make demo`, without `edgekd`."""
    shown = subprocess.run(["make", "-n", "demo"], cwd=HERE.parent, capture_output=True, text=True,
                           check=True).stdout.replace("\\\n", " ")  # fmt: skip
    found = re.findall(r"bin/edgekd ([^|\n]*)", shown)
    return [re.sub(r"--runs \S+", "", " ".join(line.split())).strip() for line in found]


def timed(command: list[str], cache: Path) -> tuple[float, float]:
    """(seconds, cores kept busy) of one command; it may end over a limit or undecided."""
    print("\n$ edgekd", shlex.join(command), flush=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "edgekd", *command], check=False,
                          env=os.environ | {"XDG_CACHE_HOME": str(cache)})  # fmt: skip
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 3, 6):
        sys.exit(done.returncode)
    busy = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, busy / seconds


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--only", nargs="+", choices=("demo", *SETS), default=["demo", *SETS])
    given = parser.parse_args()
    root = given.runs or RUNS / ("time_to_result" + ("-quick" if given.quick else ""))
    less = ["--size", "64", "--epochs", "1", "--shrink-epochs", "1", "--teacher-epochs", "1"]
    rows, figures = [], {}
    for name in given.only:
        runs = root / name
        shutil.rmtree(runs, ignore_errors=True)
        commands = [shlex.split(c) for c in (demo() if name == "demo" else LINE)]
        if name != "demo":
            commands[0] += ["--data", str(data_folder(None, name))]
        if given.quick:
            commands[0] += less
        spent = []
        for command in commands:
            seconds, cores = timed([*command, "--runs", str(runs)], root / "cache" / name)
            spent.append({"set": name, "stage": command[0], "seconds": seconds, "cores": cores})
        rows += spent
        run = runs / "cpu"
        (chosen,) = (f for f in run.glob("openvino-*") if (f / Artifact.FILE).exists())
        deployed, student = Artifact.load(chosen), Artifact.load(run / "student")
        accuracy = deployed.metrics["test_balanced_accuracy"]
        short = {"brain_tumor_mri": "default_mri", "cxr_pneumonia": "default_cxr"}.get(name, name)
        total = sum(r["seconds"] for r in spent)
        figures[f"{short}_line_s" if name == "demo" else f"{short}_s"] = total
        figures[f"{short}_accuracy"] = accuracy.value
        figures[f"{short}_cores_busy"] = sum(r["seconds"] * r["cores"] for r in spent) / total
        rows.append({"set": name, "file": chosen.name, "student": student.model,
                     "accuracy": json.loads(accuracy.model_dump_json()),
                     "verdict": Fidelity.load(run / "explain").verdict})  # fmt: skip
        shutil.rmtree(root / "cache" / name, ignore_errors=True)
    keep("time_to_result", figures, rows, packages=("torch", "timm", "openvino", "nncf"),
         quick=given.quick or len(given.only) < 3)  # fmt: skip


if __name__ == "__main__":
    main()
