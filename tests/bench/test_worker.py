"""What a worker measures, on a clock that moves when told; and that it runs for real."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from bench.test_bench import PROFILE, ort, save, tiny

from edgekd import runtimes
from edgekd.bench import energy, roofline, worker
from edgekd.records import Energy, Layer, RuntimeUnavailable, Timing
from edgekd.runtimes import Outputs


@pytest.fixture
def fake(monkeypatch, clock, tmp_path):
    """Folder of an artifact whose session takes 2 ms an image and 1 ms a call; batches opened."""
    opened = []

    def open_session(artifact, profile, batch=None):
        opened.append(batch)

        def run(images):
            assert images.shape[1:] == (3, 32, 40)
            assert batch is None or batch == len(images)
            assert images.dtype == np.float32
            clock[0] += 2_000_000 * len(images) + 1_000_000
            return Outputs(np.zeros((len(images), 3)), images)

        return run

    for module in (worker, runtimes):
        monkeypatch.setattr(module, "open_session", open_session)
    folder = tmp_path / "fake"
    save(folder, lambda p: p.write_bytes(b"x"))
    return folder, opened


def opened(fake, profile=PROFILE):
    return worker.open_file(fake[0], profile, 0)


def test_samples(fake, monkeypatch):
    found = opened(fake)
    used = iter([1.0, 1.027])  # s of CPU: 27 ms in 5 calls of 3
    monkeypatch.setattr(worker.time, "process_time", lambda: next(used))
    taken = worker.samples(found, 5)
    assert taken["samples_ms"] == [3] * 5
    assert taken["cores_busy"] == pytest.approx(1.8)
    assert found.first_ms == 3


def test_throughput_is_that_of_the_best_way_to_ask(fake):
    found = worker.throughput(opened(fake), (1, 2, 4), 0.01)
    assert found["throughput_ips"] == pytest.approx(4 / 0.009)
    assert (found["throughput_batch"], found["throughput_hint"]) == (4, "latency")
    assert fake[1] == [1, 1, 2, 4]
    assert found.keys() < Timing.model_fields.keys()


def test_the_best_batch_need_not_be_the_largest(fake, monkeypatch, clock):
    def open_session(artifact, profile, batch=None):
        def run(images):
            clock[0] += {1: 3, 2: 4, 4: 12}[len(images)] * 1_000_000

        return run

    made = opened(fake)
    monkeypatch.setattr(worker, "open_session", open_session)
    found = worker.throughput(made, (1, 2, 4), 0.01)
    assert (found["throughput_ips"], found["throughput_batch"]) == (pytest.approx(500), 2)


def test_streams_are_tried_where_the_runtime_has_them(fake):
    streams = PROFILE.model_copy(update={"runtime": "openvino"})
    pytest.importorskip("openvino")
    worker.throughput(opened(fake, streams), (1, 4), 0.01)
    assert fake[1] == [1, 1, 4, None]


def test_static_batch_has_a_throughput_of_one_image(fake):
    static = PROFILE.model_copy(update={"static_batch": True})
    found = worker.throughput(opened(fake, static), (1, 2, 16), 0)
    assert found["throughput_ips"] == pytest.approx(1 / 0.003)
    assert (found["throughput_batch"], fake[1]) == (1, [1, 1])


def test_the_same_seed_is_the_same_image(fake):
    one, same, other = (worker.open_file(fake[0], PROFILE, seed).image for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert abs(one.std() - 1) < 0.05


def test_the_whole_is_no_shorter_than_its_parts(fake):
    found = worker.stages(opened(fake), 0.01)
    assert found.keys() == {"prepare_ms", "whole_ms", "explain_ms"}
    # On this clock only the session takes time: 3 ms an image.
    assert set(found["prepare_ms"]) == {0}
    assert set(found["whole_ms"]) == {3}
    assert min(found["explain_ms"]) >= 3 + 1 + 2 * 3  # the image, then its 3 channels at once


def test_the_film_is_the_same_each_time_and_nobodys():
    from PIL import Image

    film = worker.film_bytes()
    assert film == worker.film_bytes()
    image = Image.open(io.BytesIO(film))
    assert (image.mode, image.size) == ("L", (1024, 1024))
    assert image.info == {}
    assert np.asarray(image).std() > 10


def served(fake, *more):
    first = {"folder": str(fake[0]), "profile": PROFILE.model_dump(mode="json"), "seed": 0}
    answers = []
    worker.serve([json.dumps(r) for r in (first, *more)], answers.append)
    return answers


def test_serve(fake):
    answers = served(
        fake, {"runs": 2}, {"once": True}, {"throughput_s": 0, "batches": [1, 2]}, {"memory": True}
    )
    assert answers[0].keys() == {"load_ms", "first_ms", "resident_mb", "call_ms"}
    assert answers[0]["call_ms"] == answers[0]["first_ms"] == 3
    assert answers[1].pop("cores_busy") >= 0
    assert answers[1] == {"samples_ms": [3, 3], "yardstick_ms": 0}
    assert answers[2] == {"ms": 3}
    assert answers[3]["throughput_batch"] in (1, 2)
    assert answers[4]["peak_mb"] > 1
    with pytest.raises(ValueError, match="no such request"):
        served(fake, {"what": 1})


def test_energy_is_absent_where_the_machine_does_not_tell(fake, monkeypatch):
    monkeypatch.setattr(energy, "meter", lambda _: None)
    found = served(fake, {"energy_s": 0})[1]
    assert found == {"energy": None, "absent": {"energy": "this machine has no meter"}}

    def locked(_):
        raise RuntimeUnavailable("only root may read it")

    monkeypatch.setattr(energy, "meter", locked)
    found = served(fake, {"energy_s": 0})[1]
    assert found == {"energy": None, "absent": {"energy": "only root may read it"}}
    told = Energy(source="a meter", joules=0.5, idle_watts=2)
    closed = []

    class Meter:
        def __init__(self, device):
            assert device == "CPU"

        def close(self):
            closed.append(True)

    monkeypatch.setattr(energy, "meter", Meter)
    monkeypatch.setattr(energy, "per_image", lambda *_: told)
    assert served(fake, {"energy_s": 0})[1] == {
        "energy": told.model_dump(), "absent": {},
    }  # fmt: skip
    assert closed


def test_layers_are_those_of_the_roofline(fake, monkeypatch):
    one = Layer(name="a", kind="Conv", precision="int8", ms=1, share=0.5)
    asked = []
    monkeypatch.setattr(
        roofline, "layers", lambda *_, **given: asked.append(given) or ((one,), "int8")
    )
    found = served(fake, {"layers": 3, "peak": None})[1]
    assert found == {"layers": [one.model_dump()], "executed": "int8"}
    assert asked == [{"calls": 3, "peak": None}]


@ort
def test_a_cold_start(tmp_path):
    art = save(tmp_path / "one", tiny)
    profile, image = tmp_path / "p.json", tmp_path / "film.png"
    profile.write_text(PROFILE.model_dump_json())
    image.write_bytes(worker.film_bytes())
    shown = subprocess.run(
        [sys.executable, "-m", "edgekd.bench.worker", str(art.folder), str(profile), str(image)],
        capture_output=True, check=True, text=True,
    )  # fmt: skip
    said = json.loads(shown.stdout)["probabilities"]
    assert np.sum(said) == pytest.approx(1)
    bad = subprocess.run(
        [sys.executable, "-m", "edgekd.bench.worker", str(art.folder), str(profile), str(profile)],
        capture_output=True, check=False, text=True,
    )  # fmt: skip
    assert bad.returncode == 1
    assert len(bad.stderr.strip().splitlines()) == 1
