"""What training images go through depends on what is asked for, and on nothing else."""

import numpy as np
import torch

from edgekd import data
from edgekd.data import augment, preprocess
from edgekd.records import Spec, Training

STILL = {"rotate_deg": 0, "translate": 0, "zoom": 0, "brightness": 0, "contrast": 0, "noise": 0}


def pixels(n=4):
    return np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def test_augmentation_that_is_off_changes_nothing():
    x = augment.augment(pixels(), Training(**STILL), 0, 0, np.arange(4))
    np.testing.assert_allclose(x.permute(0, 2, 3, 1) * 255, pixels(), atol=1e-3)


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    training, p = Training(), pixels()
    whole = augment.augment(p, training, 0, 1, np.arange(4))
    alone = augment.augment(p[2:3], training, 0, 1, np.array([2]))
    torch.testing.assert_close(whole[2:3], alone)
    for seed, epoch in ((1, 1), (0, 2)):
        assert not torch.allclose(whole, augment.augment(p, training, seed, epoch, np.arange(4)))


def test_flips_happen_only_where_asked():
    p = pixels(64)
    flipped = augment.augment(p, Training(hflip=True, **STILL), 0, 0, np.arange(64))
    upright = torch.from_numpy(p).permute(0, 3, 1, 2) / 255
    same = [torch.allclose(a, b, atol=1e-3) for a, b in zip(flipped, upright, strict=True)]
    mirrored = [
        torch.allclose(a.flip(2), b, atol=1e-3) for a, b in zip(flipped, upright, strict=True)
    ]
    assert sum(same) + sum(mirrored) == 64
    assert 20 < sum(mirrored) < 44


def test_a_share_of_the_images_has_a_rectangle_of_one_level():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 24, 40, 3), dtype=np.uint8)
    still = Training(warp=0, translate=0, brightness=0, contrast=0)
    plain = augment.augment(pixels, still, 0, 0, np.arange(64))
    erased = augment.augment(pixels, still.model_copy(update={"erase": 0.5}), 0, 0, np.arange(64))
    changed = (plain != erased).any(1)  # (64, 24, 40)
    share = changed.flatten(1).float().mean(1)
    assert 20 < (share > 0).sum() < 44
    assert share[share > 0].min() > 0.005
    assert share.max() < 0.11
    thin = 0
    for before, after, where in zip(plain, erased, changed, strict=True):
        if where.any():
            rows, columns = (torch.where(where.any(d))[0] for d in (1, 0))
            box = after[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.unique().numel() == 1
            thin += max(box.shape[1] / box.shape[2], box.shape[2] / box.shape[1]) > 5
        assert torch.equal(before[:, ~where], after[:, ~where])
    assert thin


def test_unwarped_images_stay_sharp():
    """Moved by whole pixels, every pixel of the middle is one of the original's."""
    p = pixels(16)
    moved = augment.augment(p, Training(**STILL | {"translate": 0.2}), 0, 0, np.arange(16))
    values = (moved[:, :, 4:12, 4:12] * 255).numpy()
    np.testing.assert_allclose(values, values.round(), atol=1e-2)
    assert not np.array_equal(values.round()[0], p.transpose(0, 3, 1, 2)[0, :, 4:12, 4:12])
    turned = augment.augment(p, Training(warp=1), 0, 0, np.arange(16)).numpy() * 255
    assert np.abs(turned - turned.round()).max() > 0.1


def test_a_view_shows_the_same_images_at_every_size(phantoms):
    dataset = data.open_dataset(phantoms)
    spec = Spec(classes=dataset.classes, size=(64, 64), channels="grey")
    samples = dataset.splits["train"]
    images = augment.view(samples, spec, Training(**STILL), 0)
    chosen = np.array([3, 0])
    for size in ((64, 64), (32, 32)):
        at_size = spec.model_copy(update={"size": size})
        expected = preprocess.normalise(
            data.load_pixels([samples[3], samples[0]], at_size), at_size
        )
        np.testing.assert_allclose(images(size, 0, chosen), expected, atol=1e-4)
    moved = augment.view(samples, spec, Training(translate=0.25, warp=0, brightness=0), 0)
    big, small = moved((64, 64), 5, chosen), moved((32, 32), 5, chosen)
    shrunk = torch.nn.functional.avg_pool2d(big, 2)
    assert torch.corrcoef(torch.stack([shrunk.flatten(), small.flatten()]))[0, 1] > 0.97
