"""What would fail after a training is tried before it: on a copy of the network, on two images."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from edgekd.explain import score_cam
from edgekd.export import onnx
from edgekd.models import feature_layers, zoo
from edgekd.records import EdgeKDError, Spec, make_folder
from edgekd.runtimes import Outputs
from edgekd.train import distributed

IMAGES = 2  # batch norm needs several


def check(
    net: nn.Module, spec: Spec, out: Path, *, exported: bool = False, layer: str = ""
) -> None:
    """EdgeKDError if `net` could not be trained on images of `spec`, explained, saved in folder
    `out` and, if it is `exported`, written as ONNX. Neither it nor what is drawn at random changes.

    layer: a stage's name; auto: the first that the rule for explained layers may choose; "": the
    usual one, see zoo.Waist.
    """
    make_folder(out)
    if not distributed.here().main:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trial = copy.deepcopy(net).cpu()
        images = torch.rand(IMAGES, 3, *spec.size)
        steps: dict[str, Callable[[], None]] = {
            "trained": lambda: _train(trial, images),
            "explained": lambda: _explain(trial, images, layer),
            "saved and loaded": lambda: _save(trial),
        }
        if exported:
            steps["exported to ONNX"] = lambda: _export(trial, images)
        for what, step in steps.items():
            try:
                step()
            except EdgeKDError as e:
                raise EdgeKDError(f"{e}; nothing was trained") from None
            except Exception as e:  # whatever a network's layers, or a tracer, stumble on
                size = " x ".join(map(str, spec.size))
                raise EdgeKDError(
                    f"{type(net).__name__} cannot be {what} at {size} pixels "
                    f"({zoo.first_line(e)}); nothing was trained: take another network or --size"
                ) from None


def _train(net: nn.Module, images: torch.Tensor) -> None:
    """Forward and backward, as a step of the loop has it."""
    net.train()(images).float().logsumexp(1).sum().backward()
    net.zero_grad(set_to_none=True)


def _explain(net: nn.Module, images: torch.Tensor, layer: str) -> None:
    """An evidence map of one image, of two channels."""
    size = (images.shape[2], images.shape[3])
    waist = zoo.Waist(net, size, "" if layer == "auto" else layer).eval()
    if layer == "auto":
        waist = waist.at(feature_layers.candidates(waist)[0])

    def session(asked: np.ndarray) -> Outputs:
        return onnx.outputs(waist, asked)

    image = images[0].numpy()
    channels = score_cam.live_channels(session(image[None]).features[0])[:2]
    if len(channels):  # a network that has learnt nothing may be silent
        score_cam.class_maps(score_cam.ask_through(session, image, channels))


def _save(net: nn.Module) -> None:
    """The file of its weights fills the same network."""
    net.load_state_dict(safetensors.torch.load(zoo.weights_of(net)))


def _export(net: nn.Module, images: torch.Tensor) -> None:
    """The file that all others are made from, in a folder that goes at once."""
    size = (images.shape[2], images.shape[3])
    with tempfile.TemporaryDirectory() as folder:
        onnx.write(zoo.Waist(net, size).eval(), images.numpy(), Path(folder), {})
