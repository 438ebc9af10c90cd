"""Two models through the same masks, against numbers worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from edgekd.explain import score_cam
from edgekd.explain.fidelity import Cases, to_grid
from edgekd.explain.shared_masks import Model, agreement, shared_maps
from edgekd.records import Artifact, Profile, Spec
from edgekd.runtimes import Outputs

SPEC = Spec(classes=("a", "b"), size=(8, 8), mean=(0,) * 3, std=(1,) * 3)
CPU = Profile(name="cpu", runtime="onnxruntime", device="CPU")
LEFT = np.zeros((2, 2), np.float32)
LEFT[:, 0] = 1


def session(weights, channels=(LEFT, 1 - LEFT)):
    """Class a is `weights` of the mean brightness of the left and of the right half."""

    def run(images):
        left, right = images[:, 0, :, :4].mean((1, 2)), images[:, 0, :, 4:].mean((1, 2))
        a = weights[0] * left + weights[1] * right
        maps = np.stack(channels)[None].repeat(len(images), 0)
        return Outputs(np.stack([a, 0 * a], 1).astype(np.float32), maps.astype(np.float32))

    return run


def artifact(folder, name):
    return Artifact(kind="onnx", model="m", files={"model.onnx": name * 64}, spec=SPEC, params=1,
                    macs=1, folder=folder)  # fmt: skip


def model(folder, name, weights, **more):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    (folder / name).mkdir(exist_ok=True)
    return Model(artifact(folder / name, name), CPU, session(weights, **more), pixels)


def test_two_channels_by_hand():
    """w_k is half the answer's difference from the mean of the two masks' answers."""
    image = np.random.default_rng(1).random((3, 8, 8)).astype(np.float32)
    channels = np.stack([LEFT, 1 - LEFT])
    found = score_cam.ask_through(session((3, 1)), image, channels)
    base = score_cam.blur(image)
    shown = []
    for channel in channels:
        mask = score_cam.resize(channel, (8, 8))
        shown.append(base + mask * (image - base))
    a = [3 * s[0, :, :4].mean() + s[0, :, 4:].mean() for s in shown]
    w = (np.array(a) - np.mean(a)) / 2  # the class's answer less the mean of both classes'
    by_hand = np.maximum(w[0] * LEFT + w[1] * (1 - LEFT), 0)
    np.testing.assert_allclose(score_cam.class_maps(found)[0], by_hand, rtol=1e-4)
    by_hand = np.maximum(-w[0] * LEFT - w[1] * (1 - LEFT), 0)
    np.testing.assert_allclose(score_cam.class_maps(found)[1], by_hand, rtol=1e-4)


def test_a_model_through_its_own_channels_is_its_own_map():
    image = np.random.default_rng(1).random((3, 8, 8)).astype(np.float32)
    own = score_cam.ask(session((3, 1)), image)
    shared = score_cam.ask_through(session((3, 1)), image, own.act)
    np.testing.assert_array_equal(score_cam.class_maps(shared), score_cam.class_maps(own))


def test_dead_channels_are_left_out():
    features = np.stack([LEFT, np.zeros((2, 2)), np.full((2, 2), 3.0), -LEFT]).astype(np.float32)
    np.testing.assert_array_equal(score_cam.live_channels(features), LEFT[None])


def test_maps_are_of_the_references_channels_and_kept(tmp_path):
    teacher = model(tmp_path, "a", (3, 1))
    # The student's own channels would show nothing: it is given the teacher's.
    student = model(tmp_path, "b", (3, 1), channels=(np.zeros((2, 2)),))
    digests = [str(i) * 64 for i in range(3)]
    found = shared_maps(student, teacher, digests)
    image = student.pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
    for i in range(3):
        passes = score_cam.ask_through(teacher.session, image[i], np.stack([LEFT, 1 - LEFT]))
        expected = [to_grid(m) for m in score_cam.class_maps(passes)]
        np.testing.assert_allclose(found[i], expected, rtol=1e-4)
    never = student._replace(session=SimpleNamespace())  # what is kept is not asked again
    np.testing.assert_array_equal(shared_maps(never, teacher, digests), found)
    with pytest.raises(TypeError):  # through other masks it would be
        shared_maps(never, model(tmp_path, "c", (1, 1)), digests)


def cases(n=30):
    return Cases([str(i) for i in range(n)], ["a"] * n, ["a"] * n, [f"p{i}" for i in range(n)])


def test_agreement_of_a_model_with_itself_and_of_strangers():
    maps = np.random.default_rng(0).random((30, 6, 6)).astype(np.float32)
    same = agreement(maps, maps, cases())
    assert same["shared_kappa"].value == pytest.approx(1)
    assert same["shared_identification"].value == 1
    assert same["shared_lost"].value == 0
    assert same["shared_lost"].high == pytest.approx(0.1157, abs=1e-3)  # Clopper-Pearson, 0 of 30
    rolled = agreement(maps, np.roll(maps, 1, 0), cases())
    assert abs(rolled["shared_kappa"].value) < 0.1
    assert rolled["shared_identification"].value == pytest.approx(0.5, abs=0.12)
    assert rolled["shared_pearson"].null is not None
