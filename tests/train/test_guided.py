"""A teacher guided by masks: what it is shown, what is wanted of it, and that it learns it."""

import numpy as np
import pytest
import torch
from PIL import Image

from edgekd import DataOptions, OutputOptions, RunOptions, TrainOptions, data, distill, teach
from edgekd.data import preprocess
from edgekd.data.augment import augment, augment_masks
from edgekd.explain import occlusion
from edgekd.models import zoo
from edgekd.records import EdgeKDError, Spec, Training
from edgekd.train.guided import Guide, guided_loss, hide, soft


def test_hiding_and_the_soft_edge_are_those_that_the_verdict_asks_with():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, 48, 40)).astype(np.float32)
    masks = np.zeros((2, 48, 40), bool)
    masks[0, 10:30, 5:20] = masks[1, 30:44, 20:39] = True
    inside = soft(torch.from_numpy(masks))
    without = hide(torch.from_numpy(images), inside)
    for i in range(2):
        expected = occlusion.soft(masks[i])
        np.testing.assert_allclose(inside[i], expected, atol=1e-6)
        np.testing.assert_allclose(without[i], occlusion.hide(images[i], expected), atol=1e-4)


def test_a_mask_moves_with_its_image():
    training = Training(warp=1, rotate_deg=30, zoom=0.3, hflip=True, brightness=0, contrast=0)
    masks = np.zeros((6, 40, 40), bool)
    masks[:, 8:20, 6:30] = True
    pixels = np.repeat(np.where(masks, 255, 0).astype(np.uint8)[..., None], 3, 3)
    for epoch in range(3):
        drawn = augment(pixels, training, 0, epoch, np.arange(6))[:, 0] >= 0.5
        moved = augment_masks(masks, training, 0, epoch, np.arange(6))
        assert torch.equal(moved, drawn)
        assert (moved.numpy() != masks).any()


def test_the_loss_by_hand():
    told = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    logits = torch.tensor([[0.0, 0.0], [0.0, np.log(3.0)]])
    # -ln(1/2), and ln(1/2) - (ln(1/4) + ln(3/4)) / 2
    by_hand = np.log(2) + np.log(0.5) - (np.log(0.25) + np.log(0.75)) / 2
    assert guided_loss(logits, told, 4).item() == pytest.approx(by_hand / 4, rel=1e-5)
    sure = torch.tensor([[40.0, 0.0], [1.0, 1.0]])
    assert guided_loss(sure, told, 4).item() == pytest.approx(0, abs=1e-6)


def test_shown_are_only_images_that_have_a_mask(phantoms):
    dataset = data.open_dataset(phantoms)
    spec = Spec(classes=dataset.classes, size=(32, 32), channels="grey")
    samples = dataset.splits["train"]
    guide = Guide(samples, spec, Training(guided=1), 0)
    there = guide.masks.any((1, 2))
    assert there.any()
    assert not there.all()
    chosen = np.concatenate([np.flatnonzero(there)[:2], np.flatnonzero(~there)[:1]])
    labels = torch.eye(len(dataset.classes))[[0, 1, 2]]
    shown, told = guide.shown(torch.randn(3, 3, 32, 32), labels, 0, chosen)
    assert shown.shape == (4, 3, 32, 32)
    assert torch.equal(told[:2], labels[:2])
    assert told[2:].unique().tolist() == [pytest.approx(1 / len(dataset.classes))]


def two_hints(root, each=24):
    """Two classes: a bright or a dark square, outlined by masks; and a strip along the border."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in (0, 1):
            for i in range(each):
                pixels = rng.integers(90, 130, (32, 32)).astype(np.uint8)
                y, x = rng.integers(8, 18, 2)
                pixels[y : y + 7, x : x + 7] = (60, 160)[label]
                pixels[:, :3] = (0, 255)[label]
                outline = np.zeros((32, 32), np.uint8)
                outline[y : y + 7, x : x + 7] = 255
                for folder, picture in ((root, pixels), (root / "masks", outline)):
                    place = folder / split / f"class{label}"
                    place.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(place / f"{i}.png")
    return root


def test_a_guided_teacher_answers_by_the_lesion_and_not_by_the_border(tmp_path):
    place = two_hints(tmp_path / "scans")
    survive = {}
    for weight in (0, 1):
        made = teach(
            "resnet10t",
            data=DataOptions(data=place, size=32),
            train=TrainOptions(epochs=5, lr=0.005, settings=(f"guided={weight}",)),
            output=OutputOptions(runs=tmp_path / "runs"),
        )
        assert made.metrics["test_balanced_accuracy"].value > 0.95
        samples = data.open_dataset(place).splits["test"]
        pixels = preprocess.normalise(data.load_pixels(samples, made.spec), made.spec)
        regions = occlusion.regions(samples, made.spec)
        hidden = [occlusion.hide(p, occlusion.soft(m))
                  for p, m in zip(pixels, regions.masks, strict=True)]  # fmt: skip
        with torch.inference_mode():
            logits, _ = zoo.load(made)(torch.from_numpy(np.stack(hidden)))
        survive[weight] = logits.softmax(1).max(1).values.mean().item()
    assert survive[0] > 0.9  # the border tells it the class
    assert survive[1] < 0.7


def test_a_set_without_masks_cannot_guide(phantoms, spec):
    samples = data.open_dataset(phantoms).splits["train"]
    bare = [s._replace(mask=None, organ=None) for s in samples]
    with pytest.raises(EdgeKDError, match=r"guided needs masks .* no training image has one"):
        Guide(bare, spec, Training(guided=1), 0)


def test_a_student_is_not_guided(phantoms, tmp_path):
    with pytest.raises(EdgeKDError, match="guided is a setting of teachers: edgekd teach"):
        distill(
            data=DataOptions(data=phantoms),
            train=TrainOptions(settings=("guided=1",)),
            output=RunOptions(runs=tmp_path),
        )
