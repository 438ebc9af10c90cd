"""Teachers are asked once for a view of the images, and what they said is replayed."""

import errno
import json
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from edgekd import data
from edgekd.data import augment
from edgekd.data.augment import view
from edgekd.models import zoo
from edgekd.ofa import supernet
from edgekd.records import EdgeKDError, NoRoom, Spec, Training
from edgekd.train import distill, loop, losses, soft_targets
from edgekd.train.soft_targets import Targets, attention

TINY = "test_resnet"
HINTS = {"attention": 1.0, "features": 1.0}


@pytest.fixture(scope="module")
def dataset(phantoms):
    return data.open_dataset(phantoms)


@pytest.fixture(scope="module")
def spec(dataset):
    return Spec(classes=dataset.classes, size=(32, 32), channels="grey")


@pytest.fixture(scope="module")
def teacher(dataset, spec, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    return distill.teach(dataset, TINY, spec, out, training=Training(epochs=1))


@pytest.fixture
def asked(monkeypatch):
    """How many images teachers were asked for."""
    count, say = [], Targets.say

    def counted(self, images):
        count.append(len(images))
        return say(self, images)

    monkeypatch.setattr(Targets, "say", counted)
    return count


def said(dataset, spec, teacher, root, **change):
    settings = Training(**{"views": 2} | change)
    images = view(dataset.splits["train"], spec, settings, 0)
    (found,) = distill.asked_of([teacher], images, dataset, spec, settings, 0, root)
    return found, images


def test_what_is_replayed_is_what_the_teacher_says(dataset, spec, teacher, tmp_path):
    found, images = said(dataset, spec, teacher, tmp_path, **HINTS)
    net = zoo.load(teacher)
    chosen = np.array([5, 0, 33])
    for number in (0, 1):
        found.begin(number)
        answer = found.of(number, chosen, images(spec.size, number, chosen))
        with torch.inference_mode():
            logits, features, last = net.answers(images(teacher.spec.size, number, chosen))
        torch.testing.assert_close(answer.logits, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(answer.attention, attention(features), atol=1e-3, rtol=0)
        torch.testing.assert_close(answer.embedding, last.mean((2, 3)), atol=1e-2, rtol=1e-2)
    assert not torch.equal(found.of(0, chosen, None).logits, answer.logits)


def test_each_view_is_asked_for_once_whoever_asks(dataset, spec, teacher, tmp_path, asked):
    count = len(dataset.splits["train"])
    for student in range(2):  # two trainings on the same data, with other batches
        found, _ = said(dataset, spec, teacher, tmp_path, batch=8 + student)
        for epoch in range(6):
            found.begin(Training(views=2).view(epoch))
    assert sum(asked) == 2 * count + 1  # one more to see the shapes
    said(dataset, spec, teacher, tmp_path, noise=0.1)[0].begin(0)  # other pictures
    assert sum(asked) == 3 * count + 2
    assert len(list(tmp_path.glob("targets-*"))) == 2


def test_stopped_in_the_middle_it_asks_for_the_rest(dataset, spec, teacher, tmp_path, asked,
                                                    monkeypatch):  # fmt: skip
    monkeypatch.setattr(soft_targets, "CHUNK", 16)
    whole, _ = said(dataset, spec, teacher, tmp_path / "whole")
    whole.begin(0)
    found, _ = said(dataset, spec, teacher, tmp_path / "cut")

    def stopped(items, what, total=None):
        yield items[0]
        raise KeyboardInterrupt

    found.track = stopped
    with pytest.raises(KeyboardInterrupt):
        found.begin(0)
    asked.clear()
    again, _ = said(dataset, spec, teacher, tmp_path / "cut")
    again.begin(0)
    assert sum(asked) == len(dataset.splits["train"]) - 16
    everyone = np.arange(len(dataset.splits["train"]))
    assert torch.equal(again.of(0, everyone, None).logits, whole.of(0, everyone, None).logits)


def test_two_that_begin_at_once_are_as_if_each_were_alone(dataset, spec, teacher, tmp_path):
    """One has seen that nothing is there; meanwhile the other makes the arrays and fills them."""
    first, images = said(dataset, spec, teacher, tmp_path, **HINTS)
    second, _ = said(dataset, spec, teacher, tmp_path, **HINTS)
    shapes = second._shapes

    def slow():
        first.begin(0)
        return shapes()

    second._shapes = slow
    second.begin(0)
    every = np.arange(len(dataset.splits["train"]))
    with torch.inference_mode():
        right = zoo.load(teacher).net(images(spec.size, 0, every))
    for each in (first, second):
        torch.testing.assert_close(each.of(0, every, None).logits, right, atol=1e-4, rtol=1e-4)


def test_whoever_comes_second_finds_the_answers(dataset, spec, teacher, tmp_path, asked):
    found = [said(dataset, spec, teacher, tmp_path)[0] for _ in range(3)]
    threads = [Thread(target=each.begin, args=(0,)) for each in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(asked) <= len(dataset.splits["train"]) + len(found)  # and one each for the shapes
    answers = [each.of(0, np.arange(9), None).logits for each in found]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert answers[0].any()


def test_answers_without_room_are_one_line_and_go_on(dataset, spec, teacher, tmp_path, monkeypatch):
    found, _ = said(dataset, spec, teacher, tmp_path, **HINTS)
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", no_room)
        with pytest.raises(NoRoom, match="there is no room"):
            found.begin(0)
    assert not list(tmp_path.glob("targets-*"))  # the room that they took is free again
    found.begin(0)
    # A file system that promised room and has none: the error comes of the write, and no SIGBUS.
    Path(found.folder / "logits.npy").unlink()
    Path(found.folder / "logits.npy").symlink_to("/dev/full")
    with pytest.raises(NoRoom, match="there is no room"):
        found.begin(1)
    assert not found._arrays["done"][1].any()


def no_room(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_damaged_array_is_told(dataset, spec, teacher, tmp_path):
    found, _ = said(dataset, spec, teacher, tmp_path)
    found.begin(0)
    path = next(tmp_path.glob("*/logits.npy"))
    path.write_bytes(path.read_bytes()[:64])
    again, _ = said(dataset, spec, teacher, tmp_path)
    with pytest.raises(EdgeKDError, match="delete"):
        again.begin(0)


def student(dataset, spec, guides, out, **change):
    name, arch = supernet.named("cpu_lat@10ms")
    settings = {"epochs": 4, "batch": 14, "views": 2} | change
    return distill.distill(
        dataset, guides, name, arch, spec, out / "student",
        training=Training(**settings), replay=out / "replay",
    )  # fmt: skip


def weights(made):
    return (made.folder / "model.safetensors").read_bytes()


def test_killed_three_times_gives_the_same_weights(dataset, spec, teacher, tmp_path, monkeypatch):
    whole = student(dataset, spec, [teacher], tmp_path / "whole", **HINTS)
    step, left = loop._step, [4, 5, 2]

    def dying(*args):
        if left and not left[0]:
            del left[0]
            raise KeyboardInterrupt
        if left:
            left[0] -= 1
        return step(*args)

    monkeypatch.setattr(loop, "_step", dying)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            student(dataset, spec, [teacher], tmp_path / "cut", **HINTS)
    cut = student(dataset, spec, [teacher], tmp_path / "cut", **HINTS)
    assert weights(cut) == weights(whole)
    # What another training left behind changes nothing either.
    (tmp_path / "cut" / "replay").rename(tmp_path / "next")
    (tmp_path / "other").mkdir()
    (tmp_path / "next").rename(tmp_path / "other" / "replay")
    assert weights(student(dataset, spec, [teacher], tmp_path / "other", **HINTS)) == weights(whole)


def test_hints_are_learnt(dataset, spec, teacher):
    """Steps on the same images: each hint comes nearer where it counts."""

    def after(**hints):
        torch.manual_seed(0)
        net = supernet.build(supernet.named("cpu_lat@10ms")[1], 3)
        settings = Training(lr=3e-3, views=1, ema=0, **hints)
        images = view(dataset.splits["train"], spec, settings, 0)
        asked = distill.asked_of([teacher], images, dataset, spec, Training(**HINTS), 0, None)
        labels = np.array([s.label for s in dataset.splits["train"]])
        objective = distill.Hybrid(images, labels, spec, settings, asked)
        state, chosen = loop._fresh(net, settings), np.arange(21)
        for _ in range(25):
            loop._step(state, objective, 0, chosen, 3e-3)
        pixels, target = objective.batch(spec.size, 0, 0, chosen)
        with torch.no_grad():
            _, features, last = zoo.Waist(net, spec.size).train().answers(pixels)
        return (losses.attention_loss(features, target.attention).item(),
                losses.likeness_loss(last, target.embedding).item())  # fmt: skip

    plain, attentive, alike = after(), after(attention=30.0), after(features=3000.0)
    assert attentive[0] < 0.7 * plain[0]
    assert alike[1] < 0.7 * plain[1]


def test_two_teachers_are_both_asked_and_named(dataset, spec, teacher, tmp_path):
    other = distill.teach(dataset, TINY, spec, tmp_path / "t", training=Training(epochs=1), seed=1)
    made = student(dataset, spec, [teacher, other], tmp_path, epochs=1, teachers="confidence",
                   mixup=0.2)  # fmt: skip
    assert made.parents == {"teacher": teacher.sha256, "teacher2": other.sha256}
    assert len(list((tmp_path / "replay").glob("targets-*"))) == 2


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_a_teacher_is_asked_of_the_very_mixture(dataset, spec, teacher, tmp_path, how):
    """At its own size; what it says is of no use to another step, so nothing is kept."""
    settings = Training(ask_mixed=True, views=2, **{how: 1.0})
    images = view(dataset.splits["train"], spec, settings, 0)
    given = distill.asked_of([teacher], images, dataset, spec, settings, 0, tmp_path)
    labels = np.array([s.label for s in dataset.splits["train"]])
    hybrid = distill.Hybrid(images, labels, spec, settings, given, seed=0)
    chosen, small = np.array([5, 0, 33, 7]), (16, 16)
    seen, target = hybrid.batch(small, 1, 9, chosen)
    assert seen.shape[2:] == small
    mixed = augment.mix(images(teacher.spec.size, 1, chosen), settings, 0, 9)
    with torch.inference_mode():
        answer = zoo.load(teacher).net(mixed.images)
    expected = (answer / settings.temperature).log_softmax(1)
    torch.testing.assert_close(target.soft[0], expected, atol=1e-5, rtol=0)
    assert not list(tmp_path.iterdir())


def test_a_student_learns_from_mixtures(dataset, spec, teacher, tmp_path):
    made = student(dataset, spec, [teacher], tmp_path, epochs=2, mixup=1.0, ask_mixed=True)
    assert made.parents == {"teacher": teacher.sha256}
    log = (tmp_path / "student" / "log.jsonl").read_text("utf-8")
    assert 0 < json.loads(log.splitlines()[-1])["soft"] < 1
