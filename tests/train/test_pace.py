"""What a training will take, by a clock that moves as told, and that timing it disturbs nothing."""

import random

import numpy as np
import pytest
import torch

from edgekd import data
from edgekd.models import zoo
from edgekd.records import Training
from edgekd.train import loop, pace
from edgekd.train.pace import Pace, Work

LITE = "ofa-lite-w1.0"


@pytest.fixture(scope="module")
def dataset(phantoms):
    """42 train, 12 val, 18 test."""
    return data.open_dataset(phantoms)


@pytest.fixture
def small(spec):
    return spec.model_copy(update={"size": (32, 32)})


def ticking():
    """A clock on which everything takes a second."""
    now = [0.0]

    def clock():
        now[0] += 0.5
        return now[0] * 2

    return clock


def test_all_that_a_training_does_is_counted():
    work = Work(epochs=3, steps=10, judged=50, once=7)
    assert work.seconds(Pace(step=2, image=0.1, measured=1)) == pytest.approx(3 * (20 + 5) + 0.7)


def test_work_of_a_data_set(dataset, monkeypatch):
    asked = Training(epochs=8, batch=10)
    assert pace.classifier_work(dataset, asked) == Work(8, 4, 12, 30)
    assert pace.classifier_work(dataset, asked, done=3) == Work(5, 4, 12, 30)
    assert pace.classifier_work(dataset, asked, done=9).epochs == 0
    cut = pace.classifier_work(dataset, asked, cut=True)
    assert cut == Work(8, 4, 12, 60 + pace.RECALIBRATED * 42)
    each = 12 + pace.RECALIBRATED * 42
    assert pace.supernet_work(dataset, asked) == Work(8, 4, each, each)
    monkeypatch.setattr(pace, "JUDGED_ON", 20)
    monkeypatch.setattr(zoo, "CALIBRATED_ON", 30)
    assert pace.supernet_work(dataset, asked).judged == 12 + pace.RECALIBRATED * 20
    fewer = pace.classifier_work(dataset, asked, cut=True)
    assert fewer.once == 60 + pace.RECALIBRATED * 30


def test_the_loop_makes_as_many_steps_as_are_counted(dataset):
    for images, batch in ((42, 10), (42, 41), (42, 32), (5, 32)):
        labels = np.zeros(images, np.int64)
        made = list(loop._batches(0, labels, Training(epochs=1, batch=batch), 0))
        assert loop.steps_an_epoch(images, batch) == len(made)


def test_images_that_there_is_time_for():
    assert pace.fitting(0.001, 48) == 48
    assert pace.fitting(pace.LONGEST / 20, 48) == 20
    assert pace.fitting(100, 48) == pace.LEAST
    assert pace.fitting(100, 2) == 2


@pytest.mark.parametrize(
    ("training", "whole"),
    [
        (Training(batch=16, epochs=10), 16),
        (Training(batch=16, epochs=10, masked=3.0, masked_share=0.25), 20),
        (Training(batch=10, epochs=10, guided=1.0), 30),
        (Training(batch=64, epochs=10), 42),  # no more than there are
    ],
)
@pytest.mark.parametrize("each", [0.01, 0.4])
def test_steps_that_are_too_long_are_timed_with_fewer_images(
    dataset, small, monkeypatch, training, whole, each
):
    """A network that needs half a second a step, and `each` an image."""
    asked = []

    def timed(net, objective, settings, clock):
        assert settings.masked == settings.guided == 0  # no teacher is asked, no mask is read

        def seconds(epoch, chosen):
            asked.append((epoch, len(chosen)))
            return 0.5 + each * len(chosen)

        return seconds

    monkeypatch.setattr(loop, "timed", timed)
    found = pace.classifier(
        "test_resnet", None, dataset.splits["train"], small, training, ticking()
    )
    assert found.step == pytest.approx(0.5 + each * whole)
    images = min(whole, 30 if each == 0.01 else 12)
    few = 3 if each == 0.01 else 1  # after SECONDS there is none
    assert asked == [(0, 2), (0, 2), *[(5, images), (9, images), (1, images)][:few]]
    assert found.measured == few


def test_a_network_is_timed_by_the_clock_and_left_as_it_was(dataset, small):
    kept, real = [], loop._step

    def step(state, *rest):
        before = [p.clone() for p in state.net.parameters()]
        result = real(state, *rest)
        kept.append(all(map(torch.equal, before, state.net.parameters())))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", step)
        samples = dataset.splits["train"]
        found = pace.classifier("test_resnet", None, samples, small, Training(batch=8), ticking())
    assert found == Pace(step=1, image=1 / pace.ASKED_AT_ONCE, measured=3)
    assert kept == [True] * 5


@pytest.mark.parametrize("schedule", ["sandwich", "progressive"])
def test_a_supernet_is_timed_by_its_schedule_and_judged_at_both_ends(dataset, small, schedule):
    found = pace.supernet(
        LITE, [32], schedule, dataset.splits["train"], small, Training(batch=8), ticking()
    )
    assert found == Pace(step=1, image=2 / pace.ASKED_AT_ONCE, measured=3)


@pytest.mark.parametrize("more", [{"int8": True}, {"precision": "auto"}, {"mixup": 0.2},
                                  {"class_weights": True}, {"balanced": True}, {"features": 1.0},
                                  {"compile": True}, {"optimizer": "sgd"}])  # fmt: skip
def test_every_setting_can_be_timed(dataset, small, more):
    training = Training.model_validate({"batch": 8, **more})
    samples = dataset.splits["train"]
    assert pace.classifier("test_resnet", None, samples, small, training, ticking()).step == 1


def test_random_numbers_are_afterwards_what_they_were(dataset, small):
    def drawn():
        return torch.rand(3).tolist(), np.random.rand(), random.random()  # noqa: NPY002

    def begin():
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002
        random.seed(7)

    begin()
    expected = drawn()
    begin()
    samples = dataset.splits["train"]
    pace.classifier("test_resnet", None, samples, small, Training(batch=4), ticking())
    pace.supernet(LITE, [32], "sandwich", samples, small, Training(batch=4), ticking())
    assert drawn() == expected


def test_epochs_that_are_behind_an_unfinished_training(tmp_path):
    assert pace.epochs_done(tmp_path / "none") == 0
    (tmp_path / loop.LOG).write_text("{}\n{}\n{}\n")
    assert pace.epochs_done(tmp_path) == 0  # without its checkpoint it begins anew
    (tmp_path / loop.CHECKPOINT).write_bytes(b"")
    assert pace.epochs_done(tmp_path) == 3
