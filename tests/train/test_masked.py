"""Images seen through a teacher's channels: masks, answers, and what a student is told of them."""

import numpy as np
import pytest
import torch

from edgekd import data
from edgekd.data.augment import view
from edgekd.explain import score_cam
from edgekd.records import Spec, Training
from edgekd.train import distill, loop
from edgekd.train.losses import Wanted, hybrid
from edgekd.train.masked import Draw, blur, centred, draw, masked_loss, masks, seen_through
from edgekd.train.shrink import Plan, Shrinking

MASKED = Training(epochs=2, batch=8, masked=1, masked_share=0.5, views=2)


def drawn(channel, smooth=False):
    n = len(channel)
    return Draw(np.full(n, True), np.array(channel, float), np.full(n, smooth), np.arange(n))


def test_what_is_shown_depends_on_seed_and_view_alone():
    one, two = draw(4000, MASKED, 0, 3), draw(4000, MASKED, 0, 3)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.shown.mean() == pytest.approx(0.5, abs=0.03)
    assert not one.smooth.any()
    assert (draw(4000, MASKED, 0, 4).shown != one.shown).any()
    assert (draw(4000, MASKED, 1, 3).shown != one.shown).any()
    hills = MASKED.model_copy(update={"masked_random": 0.25})
    assert draw(4000, hills, 0, 3).smooth.mean() == pytest.approx(0.25, abs=0.03)


def test_a_mask_is_a_live_channel_from_0_to_255():
    features = torch.zeros(3, 3, 2, 2)
    features[:, 0] = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    features[:, 1] = 7.0  # flat, so dead
    features[:, 2] = torch.tensor([[-4.0, 2.0], [0.0, 4.0]])
    features[2] = 1.0  # an image without a live channel
    found = masks(features, drawn([0, 0.6, 0]), np.arange(3))
    np.testing.assert_array_equal(found[0], [[0, 64], [128, 255]])
    np.testing.assert_array_equal(found[1], [[0, 128], [0, 255]])
    assert found[2].max() == 0
    hills = masks(features, drawn([0, 0, 0], smooth=True), np.arange(3))
    assert len({h.numpy().tobytes() for h in hills}) == 3


def test_an_image_is_seen_through_a_mask_as_score_cam_shows_it():
    images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    outline = np.array([[0, 255], [255, 51]], np.uint8)
    found = seen_through(images, torch.from_numpy(outline)[None].repeat(2, 1, 1))
    base = score_cam.blur(images[1].numpy())
    np.testing.assert_allclose(blur(images)[1], base, atol=1e-5)
    mask = score_cam.resize(outline.astype(np.float32) / 255, (16, 12))
    np.testing.assert_allclose(found[1], base + mask * (images[1].numpy() - base), atol=1e-5)


def test_nothing_is_shown(taught):
    one = targets_of(taught, None)
    none = np.flatnonzero(~one.drawn(0).shown)[:0]
    outlines, logits = one.masked(0, none)
    assert (len(outlines), tuple(logits.shape)) == (0, (0, 3))
    assert seen_through(torch.zeros(0, 3, 32, 32), outlines).shape == (0, 3, 32, 32)
    assert masked_loss(torch.zeros(0, 3), logits, 4).item() == 0


def test_the_loss_by_hand():
    own, wished = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[3.0, 0.0], [7.0, 7.0]])
    np.testing.assert_allclose(centred(wished), [[1.5, -1.5], [0, 0]])
    # Image 1: (0.5 - 1.5)^2 for both classes; image 2: nothing, a constant is no evidence.
    assert masked_loss(own, wished, 4).item() == pytest.approx(1 / 4)
    logits = torch.cat([torch.zeros(8, 2), own])
    target = Wanted(torch.full((8, 2), 0.5), masked=wished)
    plain = hybrid(logits[:8], target._replace(masked=None), MASKED).total
    both = hybrid(logits, target, MASKED.model_copy(update={"masked": 3.0})).total
    assert both.item() - plain.item() == pytest.approx(3 * 1 / 4)


@pytest.fixture(scope="module")
def taught(phantoms, tmp_path_factory):
    """(data set, Spec, a teacher of two epochs)."""
    dataset = data.open_dataset(phantoms)
    spec = Spec(classes=dataset.classes, size=(32, 32), channels="grey")
    training = Training(epochs=2, batch=16)
    folder = tmp_path_factory.mktemp("masked") / "teacher"
    return dataset, spec, distill.teach(dataset, "test_resnet", spec, folder, training=training)


def targets_of(taught, root):
    dataset, spec, teacher = taught
    images = view(dataset.splits["train"], spec, MASKED, 0)
    (one,) = distill.asked_of([teacher], images, dataset, spec, MASKED, 0, root)
    return one


def test_replayed_is_as_asked_live(taught, tmp_path):
    live, kept = targets_of(taught, None), targets_of(taught, tmp_path)
    kept.begin(1)
    chosen = np.flatnonzero(live.drawn(1).shown)[:9]
    assert len(chosen) == 9
    (masks_live, said_live), (masks_kept, said_kept) = (x.masked(1, chosen) for x in (live, kept))
    np.testing.assert_array_equal(masks_live, masks_kept)
    np.testing.assert_allclose(said_live, said_kept, atol=1e-4)
    again = targets_of(taught, tmp_path)
    again.begin(1)  # nothing is left to ask
    assert again._net is None
    np.testing.assert_array_equal(again.masked(1, chosen)[1], said_kept)
    # The teacher was shown its own channel: the whole image is answered otherwise.
    whole = live.of(1, chosen, live.images((32, 32), 1, chosen)).logits
    assert (centred(whole) - centred(said_live)).abs().max() > 1e-3


def test_a_student_learns_its_teachers_answers_under_masks(taught, tmp_path):
    dataset, spec, teacher = taught

    def apart(weight):
        training = Training(epochs=8, batch=16, masked=weight, lr=3e-3, ema=0)
        made = distill.distill(dataset, [teacher], "test_resnet", None, spec,
                               tmp_path / str(weight), training=training)  # fmt: skip
        from edgekd.models import zoo

        net, one = zoo.load(made).net, targets_of(taught, None)
        chosen = np.flatnonzero(one.drawn(0).shown)
        outlines, wished = one.masked(0, chosen)
        with torch.inference_mode():
            own = net(seen_through(one.images((32, 32), 0, chosen), outlines))
        return masked_loss(own, wished, len(chosen)).item()

    assert apart(1.0) < 0.5 * apart(0.0)


def test_stopped_and_started_again_gives_the_same_student(taught, tmp_path, monkeypatch):
    dataset, spec, teacher = taught

    def made(out, replay):
        return distill.distill(dataset, [teacher], "test_resnet", None, spec, tmp_path / out,
                               training=MASKED, replay=tmp_path / replay)  # fmt: skip

    whole = made("whole", "a")
    checkpoint = loop._checkpoint

    def stop(*args):
        checkpoint(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            made("cut", "b")
    assert made("cut", "b").sha256 == whole.sha256


def test_sub_nets_are_cut_with_their_teachers_reasons(taught):
    """Shrinking: each sub-net of a step answers for the masked images, too."""
    dataset, spec, teacher = taught
    images = view(dataset.splits["train"], spec, MASKED, 0)
    labels = np.array([s.label for s in dataset.splits["train"]])
    plan = Plan("ofa-lite-w1.0", (32,), "sandwich", 2, 0)
    said = distill.asked_of([teacher], images, dataset, spec, MASKED, 0, None)
    objective = Shrinking(plan, images, labels, spec, MASKED, said, 0)
    seen = []

    def net(batch, arch=None):
        seen.append(len(batch))
        return torch.zeros(len(batch), 3, requires_grad=True)

    chosen = np.arange(8)
    losses = list(objective.losses(net, 0, 0, chosen))
    masked = int(said[0].drawn(0).shown[:8].sum())
    assert masked > 0
    assert seen == [8 + masked] * 4
    _, wished = said[0].masked(0, np.flatnonzero(said[0].drawn(0).shown[:8]))
    told = masked_loss(torch.zeros(masked, 3), wished, 4).item()
    without = Shrinking(plan, images, labels, spec, MASKED.model_copy(update={"masked": 0.0}),
                        said, 0)  # fmt: skip
    bare = list(without.losses(net, 0, 0, chosen))
    for a, b in zip(losses, bare, strict=True):
        assert 4 * (a.total - b.total).item() == pytest.approx(told, rel=1e-4)


def test_without_a_teacher_nothing_is_masked():
    assert distill.without_teacher(MASKED).masked == 0
