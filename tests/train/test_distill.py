"""The training loop: its loss by hand, its randomness, and that a stop changes nothing."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from edgekd import data
from edgekd.models import zoo
from edgekd.ofa import supernet
from edgekd.records import Artifact, EdgeKDError, Spec, Training
from edgekd.train import distill, loop
from edgekd.train.soft_targets import Said

SIZE = (32, 32)
TINY = "test_resnet"  # timm's smallest


@pytest.fixture(scope="module")
def dataset(phantoms):
    return data.open_dataset(phantoms)


@pytest.fixture(scope="module")
def spec(dataset):
    return Spec(classes=dataset.classes, size=SIZE, channels="grey")


def weights(artifact):
    return (artifact.folder / "model.safetensors").read_bytes()


class Constant(nn.Module):
    """Says the same of every image; its logits are its only weights."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, image):
        return self.logits.expand(len(image), -1)


class Saying:
    """A teacher who always says the same."""

    def __init__(self, said):
        self.said = said

    def begin(self, view):
        pass

    def of(self, view, chosen, images):
        return self.said


@pytest.mark.parametrize(("alpha", "winner"), [(0.0, 1), (1.0, 0)])
def test_alpha_hard_weighs_the_labels(alpha, winner):
    """Labels say class 0, the teacher says class 1."""
    net = Constant(0.0, 0.0)
    asked = Training(alpha_hard=alpha, temperature=2, weight_decay=0, ema=0)
    state = loop.State(net, None, torch.optim.SGD(net.parameters(), lr=1.0))
    spec = Spec(classes=("a", "b"), size=(8, 8))

    def images(size, epoch, chosen):
        return torch.zeros(len(chosen), 3, *size)

    teacher = Saying(Said(torch.tensor([[-3.0, 3.0]]).repeat(4, 1)))
    objective = distill.Hybrid(images, np.zeros(4, int), spec, asked, [teacher])
    for _ in range(20):
        loss, hard, soft = loop._step(state, objective, 0, np.arange(4), 0.2)
        assert loss == pytest.approx(alpha * hard + (1 - alpha) * soft)
    assert net.logits.argmax().item() == winner


def test_the_learning_rate_warms_up_and_falls_to_zero():
    asked = Training(lr=1.0, epochs=10, warmup_epochs=2)
    rates = [loop._learning_rate(s, 5, asked) for s in range(50)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[30] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 39 / 40)))


def test_balanced_draws_classes_equally_often():
    labels = np.repeat([0, 1], [180, 20])
    drawn = np.concatenate(list(loop._batches(0, labels, Training(balanced=True, epochs=5), 0)))
    assert 0.4 < labels[drawn].mean() < 0.6
    plain = np.concatenate(list(loop._batches(0, labels, Training(epochs=1, batch=20), 0)))
    assert sorted(plain) == list(range(200))


def teach(dataset, spec, out, **change):
    change = {"epochs": 3, "batch": 16, "lr": 0.01} | change
    return distill.teach(dataset, TINY, spec, out, training=Training(**change))


@pytest.mark.parametrize(("images", "batch"), [(11, 2), (9, 2), (5, 4), (33, 32), (3, 2), (2, 32)])
def test_no_batch_is_of_one_image(images, batch):
    labels = np.arange(images) % 2
    sizes = [len(b) for b in loop._batches(0, labels, Training(epochs=3, batch=batch), 0)]
    assert min(sizes) > 1
    assert sum(sizes) >= 3 * min(images - 1, max(batch, images - batch // 2))


def test_a_stop_changes_nothing(dataset, spec, tmp_path, monkeypatch):
    whole = teach(dataset, spec, tmp_path / "whole")
    steps, real = [], loop._step

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 5:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        teach(dataset, spec, tmp_path / "cut")
    assert not (tmp_path / "cut" / Artifact.FILE).exists()
    with pytest.raises(EdgeKDError, match="unfinished training with other settings"):
        teach(dataset, spec, tmp_path / "cut", lr=0.02)
    cut = teach(dataset, spec, tmp_path / "cut")
    assert weights(cut) == weights(whole)
    assert cut.metrics == whole.metrics
    log = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3]
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def test_a_student_learns_from_a_teacher(dataset, spec, tmp_path):
    teacher = teach(dataset, spec, tmp_path / "teacher", epochs=1)
    name, arch = supernet.named("cpu_lat@10ms")
    student = distill.distill(
        dataset, [teacher], name, arch, spec, tmp_path / "student",
        training=Training(epochs=1, batch=24),
    )  # fmt: skip
    assert student.parents == {"teacher": teacher.sha256}
    assert student.arch == arch
    assert student.params == 2_498_267
    assert set(student.per_class) == set(dataset.classes)
    assert set(student.evaluation.paired) == {"teacher fp32"}
    beside = student.evaluation.paired["teacher fp32"].differences["accuracy"].value
    both = (a.metrics["test_accuracy"].value for a in (student, teacher))
    assert beside == pytest.approx(next(both) - next(both))
    line = json.loads((tmp_path / "student" / "log.jsonl").read_text())
    assert line["loss"] == pytest.approx(0.3 * line["hard"] + 0.7 * line["soft"])
    assert line["soft"] > 0
    with pytest.raises(EdgeKDError, match="sees resize stretch, not pad"):
        distill.distill(
            dataset, [teacher], name, arch, spec.model_copy(update={"resize": "pad"}),
            tmp_path / "other", training=Training(epochs=1),
        )  # fmt: skip


def test_a_student_may_see_smaller_pictures_than_its_teacher(dataset, spec, tmp_path):
    teacher = teach(dataset, spec, tmp_path / "teacher", epochs=1)
    seen = []
    small = spec.model_copy(update={"size": (24, 24)})

    def images(size, epoch, chosen):
        seen.append(size)
        return torch.zeros(len(chosen), 3, *size)

    training = Training()
    said = distill.asked_of([teacher], images, dataset, small, training, 0, None)
    objective = distill.Hybrid(images, np.zeros(9, int), small, training, said)
    net = supernet.build(supernet.named("cpu_lat@10ms")[1], 3)
    (loss,) = objective.losses(net, 0, 0, np.arange(2))
    assert seen == [(24, 24), (32, 32)]
    assert loss.soft > 0


def test_early_stopping(dataset, spec, tmp_path):
    made = teach(dataset, spec, tmp_path, epochs=30, patience=1, lr=0.5, optimizer="sgd", ema=0)
    run, best = made.settings["epochs_run"], made.settings["best_epoch"]
    assert run < 30
    assert run - best == 1


def test_a_cut_student_that_training_makes_worse_is_kept_as_it_is(dataset, spec, tmp_path):
    """At such a rate an epoch forgets what the network knew."""
    taught = teach(dataset, spec, tmp_path / "teacher")
    rate = Training(epochs=1, batch=16, lr=1, optimizer="sgd", warmup_epochs=0, ema=0)

    def tuned(out, **origin):
        net = zoo.load(taught).net
        return distill.distill(dataset, (), TINY, None, spec, tmp_path / out, training=rate,
                               net=net, origin=origin)  # fmt: skip

    kept, worse = tuned("kept", supernet="its sha256"), tuned("worse", student="its sha256")
    assert (kept.settings["best_epoch"], worse.settings["best_epoch"]) == (0, 1)
    name = "val_balanced_accuracy"
    assert kept.metrics[name] == kept.metrics[f"cut_{name}"]
    assert worse.metrics[name] != worse.metrics[f"cut_{name}"]


def test_a_loss_that_is_not_finite_says_what_to_change(dataset, spec, tmp_path):
    with pytest.raises(EdgeKDError, match="use a lower --lr"):
        teach(
            dataset,
            spec,
            tmp_path,
            lr=100,
            optimizer="sgd",
            warmup_epochs=0,
            ema=0,
            weight_decay=100,
            epochs=20,
        )
