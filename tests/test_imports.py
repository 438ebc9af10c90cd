"""Who may import whom (the house plan), and what must stay unloaded until it is needed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "edgekd"
GLUE = {  # may know every stage
    "cli", "cli_aside", "cli_bench", "cli_bundle", "cli_deploy", "cli_device", "cli_files",
    "options", "workplace", "seek", "finals", "trial", "candidates", "files", "stages", "evidence",
    "runs", "show", "show_device", "__main__",
}  # fmt: skip
ALLOWED = {
    "stored": set(),
    "scores": {"stored"},
    "gates": {"stored"},
    "measured": {"stored"},
    "records": {"gates", "measured", "scores", "stored"},
    "runtimes": {"records"},
    "bounds": {"records"},
    "dicom": {"records", "bounds"},
    "imaging": {"records", "bounds", "dicom"},
    "manifests": {"dicom"},
    "medmnist": {"records", "manifests"},
    "layouts": {"dicom", "manifests", "medmnist"},
    "leakage": {"records", "manifests"},
    "splits": {"records", "manifests"},
    "data": {"records", "dicom", "imaging", "layouts", "leakage", "manifests", "medmnist",
             "splits"},
    "prepare": {"records", "data", "imaging"},
    "phantom": {"records"},
    "recipes": {"records"},
    "spaces": {"records"},
    "supernet": {"records", "spaces"},
    "warmstart": {"records", "spaces", "supernet"},
    "augment": {"records", "data"},
    "checkpoints": {"records", "spaces", "supernet"},
    "plain": {"records"},
    "models": {"records", "augment", "checkpoints", "plain", "spaces", "supernet", "warmstart"},
    "compute": {"records"},
    "training": {"records", "compute", "runtimes", "imaging", "metrics"},
    "genes": {"records", "spaces"},
    "predictor": {"records", "spaces", "genes", "metrics"},
    "front": {"records"},
    "standin": {"records", "spaces"},
    "latency": {"records", "machine", "genes", "metrics", "spaces"},
    "calibrate": {"records", "runtimes", "latency", "machine", "spaces", "standin",
                  "stopwatch", "worker"},
    "search": {"records", "genes", "front", "predictor"},
    "targets": {"records", "augment", "compute", "models"},
    "losses": {"records", "augment", "targets", "training"},
    "confidence": {"records", "scores"},
    "metrics": {"records", "runtimes", "confidence"},
    "operating": {"records", "scores"},
    "paired": {"records", "scores", "metrics"},
    "evaluation": {"records", "scores", "confidence", "metrics", "operating", "paired"},
    "fakequant": {"records"},
    "distill": {"records", "augment", "compute", "data", "evaluation", "fakequant", "imaging",
                "losses", "models", "metrics", "operating", "supernet", "targets", "training"},
    "shrink": {"records", "augment", "data", "distill", "losses", "models", "spaces", "supernet",
               "training"},
    "graphs": {"records"},
    "golden": {"records", "runtimes", "imaging", "phantom"},
    "export": {"records", "runtimes", "golden", "graphs", "imaging"},
    "quantizers": {"records", "runtimes"},
    "quantize": {"records", "runtimes", "data", "golden", "quantizers"},
    "repair": {"records", "runtimes", "confidence", "graphs"},
    "devices": {"records", "runtimes"},
    "doctor": {"records", "runtimes", "golden", "quantizers"},
    "machine": {"records"},
    "familiar": {"records"},
    "signing": {"records"},
    "packages": {"records"},
    "bundle": {"records", "explain", "familiar", "golden", "handover", "imaging", "packages",
               "runtimes", "signing"},
    "device": {"records", "bundle", "confidence", "dicom", "explain", "familiar", "imaging",
               "runtimes", "stopwatch"},
    "conditions": {"records", "machine", "stopwatch"},
    "energy": {"records", "machine"},
    "roofline": {"records", "runtimes", "machine"},
    "stopwatch": set(),
    "worker": {"records", "confidence", "energy", "explain", "imaging", "machine", "roofline",
               "runtimes", "stopwatch"},
    "bench": {"records", "conditions", "machine", "roofline", "stopwatch", "worker"},
    "against": {"records", "bench", "gates", "machine", "stopwatch"},
    "there": {"records"},
    "bench_there": {"records", "runtimes", "bench", "selftest", "there"},
    "ssh": {"records"},
    "remote": {"records", "bench", "bench_there", "ssh", "there"},
    "deploy_env": {"there"},
    "selftest": {"records", "bundle", "explain", "fidelity", "golden", "imaging", "runtimes",
                 "stopwatch", "there"},
    "service": {"records", "packages"},
    "versions": {"records", "bundle", "selftest"},
    "deploy_there": {"records", "bundle", "deploy_env", "packages", "selftest", "service",
                     "there", "versions"},
    "deploy": {"records", "bundle", "deploy_there", "remote", "ssh", "versions"},
    "explain": {"records", "runtimes", "confidence"},
    "fidelity": {"records", "runtimes", "confidence", "explain"},
    "faithful": {"runtimes", "confidence", "explain"},
    "shortcuts": {"confidence"},
    "examine": {"records", "runtimes", "imaging", "explain", "faithful", "fidelity", "shortcuts"},
    "verdict": {"records", "gates"},
    "layers": {"records", "runtimes", "explain", "faithful", "models"},
    "drawings": set(),
    "pages": {"records"},
    "bench_rows": {"records", "stopwatch"},
    "bench_plots": {"records", "bench_rows", "drawings", "stopwatch"},
    "bench_page": {"records", "stopwatch", "bench_plots", "bench_rows", "drawings", "pages"},
    "scorecard": {"records", "scores", "drawings"},
    "cases": {"records", "drawings"},
    "testimony": {"records", "gates", "drawings", "cases"},
    "handover": {"records", "stopwatch"},
    "strips": {"explain"},
    "gallery": {"records", "cases", "explain", "shortcuts"},
    "report": {"records", "cases", "drawings", "explain", "gallery", "handover", "pages",
               "scorecard", "stopwatch", "strips", "testimony"},
}  # fmt: skip
HEAVY = ("torch", "numpy", "timm", "PIL", "onnx", "onnxruntime", "openvino", "nncf", "matplotlib",
         "pymoo", "pydicom", "pyarrow", "fastapi", "starlette", "uvicorn",
         "prometheus_client", "pynetdicom", "highdicom")  # fmt: skip


def imported(path):
    """Names of edgekd's own modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgekd"):
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {a.name for a in node.names}
    return found - {"__version__"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name not in GLUE | {"__init__"}:
            yield pytest.param(name, path, id="/".join(path.relative_to(PACKAGE).parts))


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_a_module_imports_only_what_the_plan_allows(name, path):
    assert name in ALLOWED, f"{path} has no place in the plan: give it one here"
    assert imported(path) <= ALLOWED[name] | {name}


@pytest.mark.parametrize("arguments", [["--help"], ["profiles"], ["distill", "--help"]])
def test_the_command_line_starts_without_heavy_packages(arguments):
    code = (
        "import sys; from edgekd.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit: pass\n"
        "print('LOADED', *{m.split('.')[0] for m in sys.modules})"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = shown.stdout.rpartition("LOADED")[2].split()
    assert not set(loaded) & set(HEAVY)


@pytest.mark.parametrize(
    "name",
    [
        "data",
        "prepare",
        "imaging",
        "phantom",
        "metrics",
        "evaluation",
        "explain",
        "fidelity",
        "examine",
        "verdict",
        "bench",
        "roofline",
        "bench_there",
        "bundle",
        "device.model",
        "deploy_there",
        "selftest",
        "golden",
        "doctor",
        "predictor",
        "search",
    ],
)
def test_what_the_device_needs_loads_no_torch(name):
    code = f"import sys, edgekd.{name}; print(*{{m.split('.')[0] for m in sys.modules}})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(shown.stdout.split()) & {
        "torch",
        "timm",
        "openvino",
        "onnxruntime",
        "nncf",
        "pydicom",
        "pyarrow",
    }


@pytest.mark.parametrize(("given", "expected"), [(None, 1), ("2", 2)])
def test_numpy_has_one_thread_unless_told_otherwise(given, expected):
    """In a fresh process: OpenBLAS reads the variable once, when numpy is first imported."""
    code = (
        "import edgekd.explain, numpy, threadpoolctl\n"
        "found = [x for x in threadpoolctl.threadpool_info() if x['internal_api'] == 'openblas']\n"
        "print(*{x['num_threads'] for x in found})"
    )
    own = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    own |= {"OPENBLAS_NUM_THREADS": given} if given else {}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env=own)  # fmt: skip
    if not shown.stdout.strip():
        pytest.skip("this numpy has no OpenBLAS")
    assert int(shown.stdout) == min(expected, os.cpu_count() or 1)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_a_file_is_read_in_a_sitting(path):
    assert len(path.read_text().splitlines()) <= 500
