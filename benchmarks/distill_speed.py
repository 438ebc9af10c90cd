"""How fast is a student's step, and what does its teacher cost?

    python benchmarks/distill_speed.py [--quick] [--data DIR] [--rounds N]

Images a second of (a) a plain PyTorch loop: files decoded and augmented by torchvision, the teacher
asked every step; (b) torchdistill's loss in that loop, where it is installed; (c) EdgeKD's first
epoch, which asks the teacher and keeps the answers; (d) EdgeKD's epochs that replay them; (e) the
student alone. All take turns in one process. The student is the middle sub-net of the cpu profile's
space at 128 pixels; VGG19 sees 128 pixels, Visformer-S its own 224. About 10 minutes on 2 cores;
--quick (a tiny teacher, one round) shows that it works and writes no result file.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch.nn import functional as F
from workbench import arguments, data_folder, keep, untrained

from edgekd import data
from edgekd.data import phantom
from edgekd.data.augment import view
from edgekd.models import zoo
from edgekd.ofa import spaces, supernet
from edgekd.records import Artifact, Spec, Training, make_folder, sha256
from edgekd.train import distill, loop

BATCH = 32
TEACHERS = {"vgg19": 128, "visformer_small": 224}


def saved(name: str, spec: Spec, out: Path) -> Artifact:
    """A teacher with random weights, in a folder."""
    waist, record = untrained(name, spec)
    path = make_folder(out) / zoo.WEIGHTS
    zoo.save_weights(waist.net, path)
    return record.model_copy(update={"files": {zoo.WEIGHTS: sha256(path)}}).save(out)


def plain_loop(
    folder: Path, teacher: Artifact, student: torch.nn.Module, spec: Spec, loss: Callable
) -> Callable[[], int]:
    """A step as tutorials write it; returns how many images it saw."""
    from torchvision import datasets, transforms

    side = max(teacher.spec.size[0], spec.size[0])
    change = transforms.Compose([
        transforms.Grayscale(3), transforms.Resize((side, side)), transforms.RandomHorizontalFlip(),
        transforms.RandomAffine(10, translate=(0.06, 0.06), scale=(0.9, 1.1)),
        transforms.ColorJitter(0.1, 0.1), transforms.ToTensor(),
        transforms.Normalize(spec.mean, spec.std),
    ])  # fmt: skip
    images = datasets.ImageFolder(str(folder / "train"), change)
    loader = torch.utils.data.DataLoader(images, BATCH, shuffle=True, drop_last=True)
    net = zoo.load(teacher).net.eval()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    batches = iter(loader)

    def step() -> int:
        nonlocal batches
        try:
            x, y = next(batches)
        except StopIteration:
            batches = iter(loader)
            x, y = next(batches)
        student.train()
        with torch.no_grad():
            soft = net(F.interpolate(x, teacher.spec.size) if side != teacher.spec.size[0] else x)
        logits = student(F.interpolate(x, spec.size) if side != spec.size[0] else x)
        optimizer.zero_grad()
        loss(logits, soft, y).backward()
        optimizer.step()
        return len(x)

    return step


def kd_loss(logits: torch.Tensor, soft: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    t = 4.0
    kl = F.kl_div(F.log_softmax(logits / t, 1), F.softmax(soft / t, 1), reduction="batchmean")
    return 0.3 * F.cross_entropy(logits, y) + 0.7 * t * t * kl


def torchdistill_loss() -> Callable | None:
    """Torchdistill's KDLoss, the same sum; None where it is not installed."""
    try:
        from torchdistill.losses.mid_level import KDLoss
    except ImportError:
        return None
    criterion = KDLoss("student", "output", "teacher", "output", temperature=4.0, alpha=0.3)

    def loss(logits: torch.Tensor, soft: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return criterion({"student": {"output": logits}}, {"teacher": {"output": soft}}, y)

    return loss


def edgekd_steps(
    dataset: data.Dataset, teacher: Artifact, spec: Spec, student: Callable, root: Path
) -> dict[str, Callable[[], int]]:
    """EdgeKD's own steps: first epoch, replayed, and alone."""
    samples = dataset.splits["train"]
    labels = np.array([s.label for s in samples])
    settings = Training(batch=BATCH, hflip=True, views=1)
    images = view(samples, spec, settings, 0)
    said = distill.asked_of([teacher], images, dataset, spec, settings, 0, root)
    said[0].begin(0)
    steps: dict[str, Callable[[], int]] = {}
    for name, teachers in (("first", said), ("replay", said), ("alone", [])):
        net = student()
        objective = distill.Hybrid(images, labels, spec, settings, teachers)
        state = loop._fresh(net, settings)
        place = np.random.default_rng(0)

        def step(name=name, objective=objective, state=state, place=place) -> int:
            chosen = place.choice(len(labels), BATCH, replace=False)
            if name == "first":
                objective.teachers[0]._ask(0, chosen)
            loop._step(state, objective, 0, chosen, 1e-3)
            return BATCH

        steps[name] = step
    return steps


def measured(steps: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Images a second of each step in each round; they take turns, in another order each round."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    order = list(steps)
    for turn in range(rounds):
        np.random.default_rng(turn).shuffle(order)
        for name in order:
            began = time.perf_counter()
            count = steps[name]()
            rates[name].append(count / (time.perf_counter() - began))
    return rates


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    figures: dict[str, float] = {}
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if given.quick:
            folder = phantom.make(work / "phantoms", per_class=24, size=64)
        else:
            folder = data_folder(given.data, "brain_tumor_mri")
        dataset = data.open_dataset(folder)
        side = 32 if given.quick else 128
        spec = Spec(classes=dataset.classes, size=(side, side), channels="grey")
        arch = spaces.uniform("ofa-lite-w1.0", "mid", side)

        def student() -> torch.nn.Module:
            torch.manual_seed(0)
            return supernet.build(arch, len(dataset.classes))

        for model, pixels in ({"test_resnet": 64} if given.quick else TEACHERS).items():
            seen = spec.model_copy(update={"size": (pixels, pixels)})
            teacher = saved(model, seen, work / model)
            steps = {"plain": plain_loop(folder, teacher, student(), spec, kd_loss)}
            if loss := torchdistill_loss():
                steps["torchdistill"] = plain_loop(folder, teacher, student(), spec, loss)
            steps |= edgekd_steps(dataset, teacher, spec, student, work)
            rates = measured(steps, 1 if given.quick else given.rounds)
            median = {n: float(np.median(r)) for n, r in rates.items()}
            short = model.partition("_")[0]
            figures |= {
                f"{short}_replay_over_alone": median["replay"] / median["alone"],
                f"{short}_replay_over_plain": median["replay"] / median["plain"],
                f"{short}_first_over_plain": median["first"] / median["plain"],
            }
            row: dict[str, object] = {"teacher": model, "pixels": pixels, "macs": teacher.macs}
            row["images_per_s"] = {n: round(m, 2) for n, m in median.items()}
            rows.append(row | {"rounds": {n: np.round(r, 2).tolist() for n, r in rates.items()}})
    figures["first_epoch_over_plain"] = min(v for k, v in figures.items() if "first" in k)
    keep(
        "distill_speed", figures, rows,
        packages=("torch", "timm", "torchvision"), quick=given.quick,
        student=f"{spaces.title(arch)} at {side} px, batch {BATCH}",
        torchdistill="measured" if torchdistill_loss() else "not installed",
    )  # fmt: skip


if __name__ == "__main__":
    main()
