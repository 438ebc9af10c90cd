"""Devices, precisions, and several processes that do what one does."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgekd import data
from edgekd.ofa import supernet
from edgekd.records import EdgeKDError, Spec, Training
from edgekd.train import distill, distributed, loop
from edgekd.train.distributed import Place

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.mark.parametrize(("world", "count"), [(1, 7), (2, 7), (3, 8), (2, 2)])
def test_parts_cover_a_batch_and_their_weights_make_its_mean(world, count):
    numbers = np.random.default_rng(0).random(count)
    places = [Place(CPU, r, world) for r in range(world)]
    assert sorted(x for p in places for x in numbers[p.part(count)]) == sorted(numbers)
    means = [p.weight(count) * numbers[p.part(count)].mean() for p in places]
    assert np.mean(means) == pytest.approx(numbers.mean())


def test_the_fastest_must_be_clearly_faster(clock):
    def takes(*ms):
        each = iter(ms)

        def step():
            clock[0] += round(next(each) * 1e6)

        return step

    slow = [20.0] * 4
    assert distributed.fastest({"a": takes(*slow), "b": takes(*[5.0] * 4)}) == "b"
    assert distributed.fastest({"a": takes(*slow), "b": takes(*[18.1] * 4)}) == "a"
    # The first call, which warms up, does not count; of the others the best does.
    assert distributed.fastest({"a": takes(*slow), "b": takes(5, 20, 20, 20)}) == "a"
    assert distributed.fastest({"a": takes(*slow), "b": takes(90, 90, 17.9, 90)}) == "b"


def command(phantoms, runs, *more):
    return ["-m", "edgekd", "distill", "--data", str(phantoms), "--size", "32", "--batch", "14",
            "--epochs", "3", "--lr", "0.005", "--set", "optimizer=sgd", "--set", "ema=0.9",
            "--set", "attention=1", "--set", "masked=1", "--runs", str(runs), *more]  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_two_processes_do_what_one_does(phantoms, tmp_path):
    """The same global batch: weights within float error, one student, one result on stdout.

    At a rate of 0.02 one process with two threads is as far from one with one thread: 0.003.
    """
    edgekd = [sys.executable, "-m", "edgekd"]
    taught = ["teach", "test_resnet", "--data", str(phantoms), "--size", "32", "--epochs", "1",
              "--runs", str(tmp_path / "t"), "--json"]  # fmt: skip
    subprocess.run([*edgekd, *taught], check=True, capture_output=True)
    (teacher,) = (tmp_path / "t").glob("shared/*/teacher-*")
    more = ["--teacher", str(teacher), "--student", "test_resnet", "--json"]
    one = command(phantoms, tmp_path / "one", *more)
    subprocess.run([sys.executable, *one], check=True, capture_output=True)
    # torchrun: what accelerate launch runs for several devices.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
              "--master-port", free_port()]  # fmt: skip
    two = subprocess.run([*launch, *command(phantoms, tmp_path / "two", *more)],
                         capture_output=True, text=True, check=False, env=os.environ)  # fmt: skip
    assert two.returncode == 0, two.stderr[-2000:]
    assert json.loads(two.stdout)["settings"]["device"] == "CPU, process 1 of 2"
    a, b = (load_file(tmp_path / n / "cpu" / "student" / "model.safetensors")
            for n in ("one", "two"))  # fmt: skip
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, atol=2e-4, rtol=2e-3)
    log = (tmp_path / "two" / "cpu" / "student" / "log.jsonl").read_text().splitlines()
    lines = (tmp_path / "one" / "cpu" / "student" / "log.jsonl").read_text().splitlines()
    for x, y in zip(log, lines, strict=True):
        assert json.loads(x)["loss"] == pytest.approx(json.loads(y)["loss"], rel=1e-3)


def test_what_one_process_must_do_says_so(phantoms, tmp_path):
    done = subprocess.run(
        [sys.executable, *command(phantoms, tmp_path, "--no-teacher")], capture_output=True,
        text=True, check=False, env=os.environ | {"WORLD_SIZE": "2"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "shrinking runs in one process" in done.stderr


@pytest.fixture(scope="module")
def dataset(phantoms):
    return data.open_dataset(phantoms)


def student(dataset, out, **change):
    spec = Spec(classes=dataset.classes, size=(32, 32), channels="grey")
    name, arch = supernet.named("cpu_lat@10ms")
    settings = Training(**{"epochs": 1, "batch": 21} | change)
    return distill.distill(dataset, [], name, arch, spec, out, training=settings)


def test_bf16_is_what_autocast_computes(dataset, tmp_path):
    plain, half = student(dataset, tmp_path / "a"), student(dataset, tmp_path / "b",
                                                             precision="bf16")  # fmt: skip
    assert (plain.settings["computed_in"], half.settings["computed_in"]) == ("fp32", "bf16")
    a, b = (load_file(m.folder / "model.safetensors") for m in (plain, half))
    key = "blocks.1.conv.depth_conv.conv.weight"
    assert b[key].dtype == torch.float32
    assert not torch.equal(a[key], b[key])
    torch.testing.assert_close(a[key], b[key], atol=2e-2, rtol=0)


def test_auto_measures_once_and_keeps_what_it_found(dataset, tmp_path, monkeypatch):
    asked = []

    def found(steps):
        asked.append(sorted(steps))
        for step in steps.values():
            step()
        return "bf16"

    monkeypatch.setattr(distributed, "fastest", found)
    judge = loop._judged
    monkeypatch.setattr(loop, "_judged", lambda *a: judge(*a))
    checkpoint, calls = loop._checkpoint, []

    def once(*args):
        checkpoint(*args)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_checkpoint", once)
    with pytest.raises(KeyboardInterrupt):
        student(dataset, tmp_path, epochs=2, precision="auto")
    made = student(dataset, tmp_path, epochs=2, precision="auto")
    assert asked == [["bf16", "fp32"]]
    assert made.settings["computed_in"] == "bf16"
    assert made.settings["training"]["precision"] == "auto"


def test_an_unknown_precision():
    with pytest.raises(EdgeKDError, match=r"precision.*'fp32', 'bf16' or 'auto'"):
        Training.parse({"precision": "fp8"}, "--set")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_is_used_and_named(dataset, tmp_path):
    made = student(dataset, tmp_path)
    assert made.settings["device"] == torch.cuda.get_device_name()
