"""The house: its layers, what must stay unloaded until it is needed, and what is exported."""

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import edgekd

PACKAGE = Path(edgekd.__file__).parent
ROOMS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))
HEAVY = ("torch", "numpy", "timm", "PIL", "onnx", "onnxruntime", "openvino", "nncf", "matplotlib",
         "pymoo", "pydicom", "pyarrow", "fastapi", "starlette", "uvicorn",
         "prometheus_client", "pynetdicom", "highdicom")  # fmt: skip


def test_a_room_imports_only_rooms_below_it():
    """The contracts in pyproject.toml, by import-linter."""
    told = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=PACKAGE.parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout
    assert "Contracts: 2 kept, 0 broken." in told.stdout


def test_no_circle_within_a_room():
    import grimp

    graph = grimp.build_graph("edgekd", exclude_type_checking_imports=True, cache_dir=None)
    for room in ROOMS:
        inside = graph.find_descendants(f"edgekd.{room}")
        imports = {m: graph.find_modules_directly_imported_by(m) & inside for m in inside}
        list(TopologicalSorter(imports).static_order())  # CycleError names a circle


def test_the_house_is_not_a_corridor():
    top = [p for p in PACKAGE.iterdir() if p.name != "__pycache__"]
    assert len(top) <= 20
    assert not [p for p in top if p.name.startswith("cli_")]
    for room in ROOMS:
        files = list((PACKAGE / room).rglob("*.py"))
        lines = {p: len(p.read_text("utf-8").splitlines()) for p in files}
        assert sum(lines.values()) <= 4000, room
        assert max(lines.values()) <= 500, max(lines, key=lines.__getitem__)


def exported():
    for room in ["", *ROOMS]:
        package = importlib.import_module(f"edgekd.{room}".rstrip("."))
        for name in package.__all__:
            yield pytest.param(package, name, id=f"{room}.{name}".lstrip("."))


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_is_for_and_what_it_exports(room):
    package = importlib.import_module(f"edgekd.{room}")
    assert package.__doc__
    assert len(package.__doc__.splitlines()[0]) <= 100
    assert isinstance(package.__all__, list)
    inside = {m.name for m in pkgutil.iter_modules(package.__path__)}
    assert not inside & set(package.__all__), "a module of that name would hide what is exported"


@pytest.mark.parametrize(("package", "name"), list(exported()))
def test_what_is_exported_is_there_and_documented(package, name):
    pytest.importorskip("torch", reason="pip install 'edgekd[train]'")
    found = getattr(package, name)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert inspect.getdoc(found), "no docstring"
    if inspect.isfunction(found):
        told = inspect.signature(found)
        bare = [p.name for p in told.parameters.values() if p.annotation is p.empty]
        assert not bare, f"no type: {bare}"
        assert told.return_annotation is not told.empty


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'edgekd' has no attribute 'distil'"):
        edgekd.distil  # noqa: B018
    assert edgekd.EdgeKDError is importlib.import_module("edgekd.records").EdgeKDError


def test_type_checkers_and_python_export_the_same():
    """The imports under TYPE_CHECKING are what `lazy_exports` is told."""
    for package in [PACKAGE, *(PACKAGE / r for r in ROOMS)]:
        tree = ast.parse((package / "__init__.py").read_text("utf-8"))
        told = next((n for n in tree.body if isinstance(n, ast.If)), None)
        if told is None:
            continue
        names = {a.asname for n in told.body if isinstance(n, ast.ImportFrom) for a in n.names}
        module = importlib.import_module(".".join(package.relative_to(PACKAGE.parent).parts))
        if "lazy_exports" in (package / "__init__.py").read_text("utf-8"):
            assert names == set(module.__all__)


def test_importing_edgekd_loads_next_to_nothing():
    code = "import sys, edgekd; print(*{m.split('.')[0] for m in sys.modules})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(shown.stdout.split()) & {*HEAVY, "pydantic", "typer", "rich"}


@pytest.mark.parametrize("arguments", [["--help"], ["profiles"], ["distill", "--help"]])
def test_the_command_line_starts_without_heavy_packages(arguments):
    code = (
        "import sys; from edgekd.cli.main import app\n"
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
        "data.dataset",
        "data.deidentify",
        "data.preprocess",
        "data.phantom",
        "metrics.classification",
        "metrics.evaluation",
        "explain.score_cam",
        "explain.fidelity",
        "explain.examine",
        "explain.verdict",
        "bench.bench",
        "bench.roofline",
        "bench.remote_side",
        "bundle.bundle",
        "serve.model",
        "deploy.device_side",
        "deploy.selftest",
        "runtimes.golden",
        "pipeline.doctor",
        "ofa.accuracy_predictor",
        "ofa.nsga2",
        "pipeline.run",
        "pipeline.distill",
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
        "import edgekd.explain.score_cam, numpy, threadpoolctl\n"
        "found = [x for x in threadpoolctl.threadpool_info() if x['internal_api'] == 'openblas']\n"
        "print(*{x['num_threads'] for x in found})"
    )
    own = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    own |= {"OPENBLAS_NUM_THREADS": given} if given else {}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env=own)  # fmt: skip
    if not shown.stdout.strip():
        pytest.skip("this numpy has no OpenBLAS")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    assert int(shown.stdout) == min(expected, cores)
