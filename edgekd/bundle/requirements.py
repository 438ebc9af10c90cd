"""What a device has to have installed: what edgekd needs there, and what that needs in turn."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from importlib import metadata

from edgekd import __version__
from edgekd.records import Artifact, EdgeKDError, needing

# What a device has beside its runtime.
DEVICE = ("numpy", "pillow", "pydantic", "typer", "rich", "filelock")
SERVE = ("fastapi", "uvicorn", "prometheus-client")  # what `edgekd serve` takes besides
DICOM = ("pydicom", "pylibjpeg", "pylibjpeg-openjpeg", "pynetdicom", "highdicom")


def requirements(runtime: str) -> tuple[str, ...]:
    """The packages that a device needs, those that they need among them, at the versions that are
    here: "numpy==2.3.1".

    What is not here, such as `edgekd[dicom]`, or for a Python or system that is not, cannot be
    named. TensorRT is not among them: JetPack brings it.
    """
    with needing(lambda x: EdgeKDError(f"edgekd bundle needs {x}: pip install 'edgekd[bundle]'")):
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    runtimes = () if runtime == "tensorrt" else (runtime,)
    left = [Requirement(name) for name in (*DEVICE, *SERVE, *DICOM, *runtimes)]
    found: dict[str, str] = {}
    seen = set()
    while left:
        wanted = left.pop()
        name, extras = canonicalize_name(wanted.name), ("", *sorted(wanted.extras))
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = metadata.version(name)
            needed = [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue
        for other in needed:
            mark = other.marker
            if mark is None or any(mark.evaluate({"extra": extra}) for extra in extras):
                left.append(other)
    return tuple(sorted(f"{name}=={version}" for name, version in found.items()))


def others(wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of the `wanted` packages that are here in another version: "numpy 2.2.6 (2.3.1)"."""
    found = []
    for line in wanted:
        name, _, version = line.partition("==")
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:  # whoever needs it says so
            continue
        if here != version:
            found.append(f"{name} {here} ({version})")
    return tuple(found)


def sbom(model: Artifact, wanted: Sequence[str]) -> bytes:
    """CycloneDX 1.6: the model and the packages that run it; the same input, the same bytes."""
    components: list[dict[str, object]] = [
        {
            "type": "machine-learning-model", "bom-ref": "model", "name": model.model,
            "version": model.sha256[:16],
            "hashes": [{"alg": "SHA-256", "content": model.sha256}],
        },
        {"type": "application", "bom-ref": "edgekd", "name": "edgekd", "version": __version__,
         "purl": f"pkg:pypi/edgekd@{__version__}"},
    ]  # fmt: skip
    for line in wanted:
        name, _, version = line.partition("==")
        components.append(
            {"type": "library", "bom-ref": name, "name": name, "version": version,
             "purl": f"pkg:pypi/{name}@{version}"}
        )  # fmt: skip
    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"edgekd:{model.sha256}:{','.join(wanted)}")
    bom = {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": f"urn:uuid:{serial}",
        "version": 1, "components": components,
        "dependencies": [{"ref": "edgekd", "dependsOn": [c["bom-ref"] for c in components[2:]]}],
    }  # fmt: skip
    return (json.dumps(bom, indent=1) + "\n").encode()
