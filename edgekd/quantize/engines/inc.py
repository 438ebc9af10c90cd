"""Intel Neural Compressor 3: the torch program quantised (PT2E), then written as Q/DQ ONNX.

Its quantiser leaves float islands between convolutions, which can make the file slower than FP32:
one candidate among several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx as format_
import torch
from onnx import numpy_helper

from edgekd.quantize.engines import How, quiet
from edgekd.quantize.engines.ort import tidy
from edgekd.records import EdgeKDError

with quiet():
    from neural_compressor.torch.quantization import (
        INT8StaticQuantConfig,
        TuningConfig,
        autotune,
        convert,
        prepare,
    )

METHODS = {
    "min-max": "ranges as a moving average of those seen",
    "kl": "ranges of the least loss of information",
    "mixed": "min-max; first layer and classifier in FP16 if it can write that, else in FP32",
    "autotune": "min-max, kl and symmetric activations in turn until answers stay what they were",
}
FILES = ("model.onnx",)
KIND = "onnx"
RUNTIMES = ("onnxruntime", "openvino", "tensorrt")
PACKAGES = ("neural-compressor-pt", "torchao", "torch")
KEEPS = False
BATCH = 16
SAME = 0.01  # share of answers that may change before autotune stops looking


def write(onnx: Path, images: np.ndarray, out: Path, how: How) -> dict[str, Any]:
    """From the program beside the ONNX file; the weights are folded to 8 bit."""
    if how.keep:
        raise EdgeKDError("engine inc tunes by itself (--method autotune): it keeps no layers")
    program = onnx.with_suffix(".pt2")
    if not program.is_file():
        raise EdgeKDError(f"{program} is missing: edgekd export --format onnx writes it")
    batches = [torch.from_numpy(x) for x in np.array_split(images, -(-len(images) // BATCH))]
    any_batch = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    opset = next(o.version for o in format_.load(onnx).opset_import if o.domain == "")
    with quiet():
        module: Any = torch.export.load(program).module()
        module._exported, module.dynamic_shapes = True, any_batch  # as its own export marks it
        quantised, chosen = _quantised(module, batches, how)
        again = torch.export.export(quantised, (batches[0][:2],), dynamic_shapes=any_batch)
        written = torch.onnx.export(
            again, input_names=["image"], output_names=["logits", "features"],
            opset_version=opset, external_data=False, verbose=False, dynamo=True,
        )  # fmt: skip
    assert written is not None
    model = written.model_proto
    _fold(model)
    found = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if not found:
        raise EdgeKDError(f"neural-compressor found nothing to quantise in {program}")
    tidy(model, onnx, out / FILES[0])
    return {"quantised": found} | chosen


def _quantised(
    module: Any, batches: list[torch.Tensor], how: How
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """(the converted module, what autotune chose)."""

    def calibrate(model: torch.nn.Module) -> None:
        for x in batches:
            model(x)

    symmetric = {"act_dtype": "int8", "act_sym": True} if how.symmetric else {}
    if how.method != "autotune":
        algo = "kl" if how.method == "kl" else "minmax"
        config = INT8StaticQuantConfig(act_algo=algo, **symmetric)
        for name in _ends(module) if how.method == "mixed" else ():
            config.set_local(name, INT8StaticQuantConfig(w_dtype="fp16", act_dtype="fp16"))
        ready = prepare(module, quant_config=config, example_inputs=(batches[0][:2],))
        calibrate(ready)
        return convert(ready), {}
    with torch.no_grad():
        right = torch.cat([module(x)[0] for x in batches]).argmax(1)
    tried = [INT8StaticQuantConfig(act_algo=a, **(symmetric or s))
             for s in ({}, {"act_dtype": "int8", "act_sym": True})[: 1 if symmetric else 2]
             for a in ("minmax", "kl")]  # fmt: skip
    shares: list[float] = []

    def same(model: torch.nn.Module) -> float:
        with torch.no_grad():
            shares.append(float((torch.cat([model(x)[0] for x in batches]).argmax(1) == right)
                                .float().mean()))  # fmt: skip
        return shares[-1]

    found = autotune(
        module, TuningConfig(config_set=tried, tolerable_loss=SAME, max_trials=len(tried)),
        eval_fn=same, run_fn=calibrate, example_inputs=(batches[0][:2],),
    )  # fmt: skip
    if found is None:
        raise EdgeKDError(
            f"autotune tried {len(tried)} ways; the best keeps {100 * max(shares[1:]):.1f} % of "
            "the answers: another engine, or fp32"
        )
    return found, {"answers_kept": shares[1:]}


def _ends(module: Any) -> tuple[str, str]:
    """Names of the first and the last module that multiply matrices."""
    kinds = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    found = [name for node in module.graph.nodes if node.target in kinds
             for name, _ in list(node.meta["nn_module_stack"].values())[-1:]]  # fmt: skip
    return found[0], found[-1]


def _fold(model: format_.ModelProto) -> None:
    """Weights that are quantised when the model is run are quantised now, and stored as 8 bit."""
    values = {i.name: i for i in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in values:
            w, scale, zero = (numpy_helper.to_array(values[n]) for n in node.input)
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            shape = [-1 if i == axis else 1 for i in range(w.ndim)] if scale.ndim else []
            info = np.iinfo(zero.dtype)
            whole = np.rint(w / scale.reshape(shape)) + zero.reshape(shape)
            folded = np.clip(whole, info.min, info.max).astype(zero.dtype)
            model.graph.initializer.append(numpy_helper.from_array(folded, node.output[0]))
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    left = [i for i in model.graph.initializer if i.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(left)
