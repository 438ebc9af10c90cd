"""What a device gets is what was bundled, by whom, or it is refused."""

import hashlib
import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import edgekd
from edgekd.bundle import bundle, requirements, signing
from edgekd.cli.main import app
from edgekd.pipeline import bundle as pipeline
from edgekd.records import Artifact, EdgeKDError, Profile

pytest.importorskip("cryptography", reason="pip install 'edgekd[bundle]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgekd[onnxruntime]'")
TINY = Path(edgekd.__file__).parent / "runtimes/tiny"
CPU = Profile(name="cpu", runtime="onnxruntime", device="CPU")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return signing.new_key(folder / "a.pem"), signing.new_key(folder / "b.pem")


def make(out, key=None, intended_use="research", **change):
    given = bundle.Given(Artifact.load(TINY), CPU, report=b"<p>")._replace(**change)
    return bundle.make(out, given, intended_use=intended_use, key=key)


@pytest.fixture
def made(tmp_path, keys):
    make(tmp_path / "x.edgekd", keys[0].with_suffix(""))
    return tmp_path / "x.edgekd"


def test_the_same_input_is_the_same_bytes(made, tmp_path, keys):
    make(tmp_path / "other" / "x.edgekd", keys[0].with_suffix(""))
    assert (tmp_path / "other" / "x.edgekd").read_bytes() == made.read_bytes()


def test_a_device_that_is_not_here(tmp_path):
    """Its profile stands in the bundle, without a path of ours; the maps are made with another."""
    jetson = Profile.read("jetson").model_copy(update={"latency_table": "/home/me/table.json"})
    found = make(tmp_path / "x.edgekd", profile=jetson, here=CPU)
    assert found.profile == jetson.model_copy(update={"latency_table": ""})
    assert found.buildable
    assert not any(r.startswith(("onnxruntime", "tensorrt")) for r in found.requirements)


def test_what_is_in_it_is_what_it_says(made, tmp_path, keys):
    found = bundle.extract(made, tmp_path / "there", keys[0])
    assert found.trusted
    assert found.signer.startswith("SHA256:")
    model = Artifact.load(tmp_path / "there" / "model")
    assert model.sha256 == found.manifest.model == Artifact.load(TINY).sha256
    assert model.evaluation is None
    with np.load(tmp_path / "there" / bundle.EXPECTED) as kept:
        assert kept["maps"].shape[0] == len(kept["answers"]) == 3
    assert found.manifest.requirements == requirements.requirements("onnxruntime")
    assert any(r.startswith("onnxruntime==") for r in found.manifest.requirements)
    bom = json.loads((tmp_path / "there" / "sbom.cdx.json").read_text())
    assert bom["bomFormat"] == "CycloneDX"
    needed = [f"{c['name']}=={c['version']}" for c in bom["components"] if c["type"] == "library"]
    assert tuple(needed) == found.manifest.requirements
    assert "edgekd" in {c["name"] for c in bom["components"]}


def test_any_flipped_byte_is_noticed(made, tmp_path):
    whole = made.read_bytes()
    seen = set()
    rng = np.random.default_rng(0)
    for at in rng.choice(len(whole), 150, replace=False):
        bad = bytearray(whole)
        bad[at] ^= 1 << int(rng.integers(8))
        path = tmp_path / "bad.edgekd"
        path.write_bytes(bytes(bad))
        try:
            found = bundle.check(path)
        except EdgeKDError as e:
            seen.add(str(e).split(":")[1][:12])
        else:  # a byte of the zip's own that no reader looks at: all that is in it is right
            assert bundle._read(path) == bundle._read(made)
            assert found.signer
    assert seen


def test_whose_signature_it_is_matters(made, tmp_path, keys):
    assert bundle.check(made, keys[0]).trusted
    assert not bundle.check(made).trusted
    with pytest.raises(EdgeKDError, match=r"is signed by SHA256:.*, not by SHA256:"):
        bundle.check(made, keys[1])
    make(tmp_path / "bare.edgekd")
    assert bundle.check(tmp_path / "bare.edgekd").signer == ""
    with pytest.raises(EdgeKDError, match="is not signed"):
        bundle.check(tmp_path / "bare.edgekd", keys[0])


def rewritten(path, change):
    """The bundle with its entries changed by `change(dict)`, zipped as it was."""
    content = bundle._read(path)
    change(content)
    path.write_bytes(bundle._zipped(content))


def test_another_manifest_under_the_old_signature(made, keys):
    def change(content):
        content["bundle.json"] = content["bundle.json"].replace(b"research", b"diagnosis")

    rewritten(made, change)
    with pytest.raises(EdgeKDError, match=r"its signature is not that of bundle\.json"):
        bundle.check(made, keys[0])


def test_signed_anew_by_another(made, tmp_path, keys):
    """Whoever changes it can sign it, but not as we."""
    other = tmp_path / "other.edgekd"
    make(other, keys[1].with_suffix(""), intended_use="diagnosis")
    with pytest.raises(EdgeKDError, match="not by"):
        bundle.check(other, keys[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("card.md"), "lacks card.md"),
        (lambda c: c.update({"onnx/more": b""}), "has onnx/more, which"),
        (lambda c: c.update({"card.md": b"other"}), "card.md is not what was bundled"),
        (lambda c: c.pop("bundle.json"), "it is no bundle"),
        (lambda c: c.update({"bundle.json": b"{"}), "is no JSON"),
        (lambda c: c.update({"bundle.json": b"[]"}), "bundle.json"),
        (lambda c: c.update({"bundle.json": b"{}"}), "bundle.json"),
        (
            lambda c: c.update(
                {
                    "bundle.json": c["bundle.json"].replace(
                        b'"schema_version": 1,', b'"schema_version": 99,', 1
                    )
                }
            ),
            r"bundle\.json has schema version 99, this edgekd reads 1",
        ),
    ],
)
def test_what_is_not_as_bundled(made, change, words):
    rewritten(made, change)
    with pytest.raises(EdgeKDError, match=words) as caught:
        bundle.check(made)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    ["../evil", "/evil", "a/../../evil", "a\\evil", "a/b/c", "./evil", "a//b", "model/", "model/..",
     "model/../evil", "model/a/evil", "MODEL/evil", "src/sitecustomize.py", "deployed.json",
     "built/artifact.json", "unpacked/x", "edgekd", "bundle.edgekd"],
)  # fmt: skip
def test_no_entry_leads_out(made, tmp_path, name):
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as whole:
            whole.writestr(zipfile.ZipInfo(name), b"x")
        made.write_bytes(buffer.getvalue())
    for ask in (bundle.check, lambda p: bundle.extract(p, tmp_path / "deep" / "there")):
        with pytest.raises(EdgeKDError, match=r"has an entry"):
            ask(made)
    assert not list(tmp_path.rglob("evil"))


def test_a_bomb_is_not_unpacked(made):
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as whole:
            whole.writestr("bundle.json", bytes(100_000_000))
        made.write_bytes(buffer.getvalue())
    with pytest.raises(EdgeKDError, match="is compressed or locked"):
        bundle.check(made)


def test_what_is_no_bundle(tmp_path):
    (tmp_path / "x").write_bytes(b"not a zip")
    for path in (tmp_path / "x", tmp_path / "missing", tmp_path):
        with pytest.raises(EdgeKDError):
            bundle.check(path)


def test_a_folder_that_is_there_is_left_alone(made, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(EdgeKDError, match="is there already"):
        bundle.extract(made, tmp_path / "there")
    assert not list(tmp_path.glob(".extract-*"))


def test_keys(tmp_path, keys):
    private = keys[0].with_suffix("")
    assert private.stat().st_mode & 0o777 == 0o600
    with pytest.raises(EdgeKDError, match="cannot be had again"):
        signing.new_key(private)
    for load, path in ((signing.private_key, keys[0]), (signing.public_key, private)):
        with pytest.raises(EdgeKDError, match="key"):
            load(path)
    with pytest.raises(EdgeKDError, match="cannot read the key"):
        signing.public_key(tmp_path / "none")


def test_openssh_keys_are_read_too(tmp_path):
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    key = ed25519.Ed25519PrivateKey.generate()
    private, public = tmp_path / "id", tmp_path / "id.pub"
    private.write_bytes(
        key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption())
    )
    public.write_bytes(key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH))
    make(tmp_path / "x.edgekd", private)
    assert bundle.check(tmp_path / "x.edgekd", public).trusted
    public.write_bytes(public.read_text().encode("utf-16"))  # as PowerShell writes it
    assert bundle.check(tmp_path / "x.edgekd", public).trusted
    public.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EdgeKDError, match="holds no key: PEM is text"):
        bundle.check(tmp_path / "x.edgekd", public)
    other = rsa.generate_private_key(65537, 2048).public_key()
    public.write_bytes(other.public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH))
    with pytest.raises(EdgeKDError, match="is no Ed25519 key"):
        bundle.check(tmp_path / "x.edgekd", public)


def test_the_commands(made, tmp_path, keys):
    run = CliRunner().invoke
    shown = run(app, ["bundle", "verify", str(made), "--key", str(keys[0]), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["trusted"]
    wrong = run(app, ["bundle", "verify", str(made), "--key", str(keys[1])])
    assert wrong.exit_code == 1
    told = run(app, ["bundle", "key", str(tmp_path / "k.pem")])
    assert told.exit_code == 0
    assert (tmp_path / "k.pem.pub").is_file()


def test_signed_code_is_code_all_the_same(made, keys):
    """Whoever has the key vouches for a model, not for what runs beside it."""

    def change(content):
        content["src/sitecustomize.py"] = b"raise SystemExit"
        manifest = bundle.Manifest.parse(json.loads(content["bundle.json"]), "bundle.json")
        files = manifest.files | {
            "src/sitecustomize.py": hashlib.sha256(b"raise SystemExit").hexdigest()
        }
        first = (manifest.model_copy(update={"files": files}).model_dump_json() + "\n").encode()
        told = signing.signed(first, signing.private_key(keys[0].with_suffix("")))
        content.update({"bundle.json": first, "signature.json": told.model_dump_json().encode()})

    rewritten(made, change)
    with pytest.raises(EdgeKDError, match=r"has an entry 'src/sitecustomize\.py': no bundle has"):
        bundle.check(made, keys[0])


def test_onnx_of_another_precision_rebuilds_nothing(tmp_path):
    """A run's ONNX is FP32; of what was quantised afterwards it knows nothing."""
    onnx = Artifact.load(TINY)
    run = tmp_path / "run"
    shutil.copytree(TINY, run / "onnx")
    shutil.copytree(TINY, run / "int8")
    small = onnx.model_copy(update={"precision": "int8"}).save(run / "int8")
    (tmp_path / "model.xml").touch()

    def ir(precision, parents):
        files = {"model.xml": "0" * 64}
        change = {"files": files, "precision": precision, "parents": parents, "folder": tmp_path}
        return onnx.model_copy(update=change)

    assert pipeline._source(run, ir("fp32", {"onnx": onnx.sha256})).folder == run / "onnx"
    assert pipeline._source(run, ir("int8", {"onnx": small.sha256})).folder == run / "int8"  # QDQ
    assert pipeline._source(run, ir("fp16", {"onnx": onnx.sha256})) is None
    assert pipeline._source(run, ir("int8", {"onnx": "0" * 64})) is None
    assert pipeline._source(run, onnx) is None
    with pytest.raises(
        EdgeKDError, match=r"model\.onnx is no ONNX in int8: \S+model\.xml cannot be"
    ):
        make(tmp_path / "x.edgekd", model=ir("int8", {}), source=onnx)


def test_the_packages_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def plain(lines):
        return {re.match(r"[\w-]+", line)[0] for line in lines if "python_version" not in line}

    assert plain(project["dependencies"]) == {*requirements.DEVICE}
    assert plain(extras["serve"]) == {*requirements.SERVE}
    assert plain(extras["dicom"]) == {*requirements.DICOM}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed("a", "1.0", "b>=2") is a package of that name here, which needs those lines."""
    house = tmp_path / "house"
    monkeypatch.syspath_prepend(house)

    def add(name, version, *needs):
        info = house / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {x}" for x in needs]
        (info / "METADATA").write_text("\n".join(lines) + "\n")

    return add


def test_what_is_needed_in_turn(installed):
    installed("runtime", "1.5", "Some.Thing[fast]>=2", "not-here", "old; python_version < '3'")
    installed("some-thing", "2.0", "runtime", "quick; extra == 'fast'", "slow; extra == 'slow'")
    for name in ("quick", "slow", "old"):
        installed(name, "3.0")
    before, found = requirements.requirements("tensorrt"), requirements.requirements("runtime")
    assert {*found} - {*before} == {"runtime==1.5", "some-thing==2.0", "quick==3.0"}
    assert list(found) == sorted(found)
    names = {x.partition("==")[0] for x in before}
    pytest.importorskip("fastapi", reason="pip install 'edgekd[serve]'")
    pytest.importorskip("highdicom", reason="pip install 'edgekd[dicom]'")
    assert names >= {"pydantic-core", "starlette", "h11", "pydicom", "pynetdicom", "highdicom"}
    assert not names & {"tensorrt", "cryptography", "pytest", "torch"}


def test_other_versions_are_told(installed):
    installed("some-thing", "2.0")
    wanted = ("some-thing==2.1", "not-here==1.0", *requirements.requirements("tensorrt"))
    assert requirements.others(wanted) == ("some-thing 2.0 (2.1)",)
