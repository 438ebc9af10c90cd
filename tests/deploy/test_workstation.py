"""`edgekd deploy` against a real OpenSSH server on this machine, see loopback.py.

Whatever fails or is cut off: what is current stays whole, and answers.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import edgekd
from edgekd import runtimes
from edgekd.bundle import bundle, requirements, signing
from edgekd.cli.main import app
from edgekd.deploy import device_side, environment, selftest, versions, workstation
from edgekd.deploy import systemd as service
from edgekd.deploy.device_side import Deployed
from edgekd.records import Artifact, Budget, EdgeKDError, Profile, RuntimeUnavailable, sha256
from edgekd.runtimes import golden

pytest.importorskip("cryptography", reason="pip install 'edgekd[bundle]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgekd[onnxruntime]'")
TINY = Path(edgekd.__file__).parent / "runtimes/tiny"
CPU = Profile(name="cpu", runtime="onnxruntime", device="CPU", threads=1)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return signing.new_key(folder / "a.pem"), signing.new_key(folder / "b.pem")


@pytest.fixture
def make(tmp_path, keys):
    """make("a") writes a bundle, signed; other reports are other bundles."""

    def made(name, *, key=keys[0], model=TINY, profile=CPU, report=b""):
        path = tmp_path / f"{name}.edgekd"
        given = bundle.Given(Artifact.load(model), profile, report=report or name.encode())
        private = key.with_suffix("") if key else None
        bundle.make(path, given, intended_use="research", key=private)
        return path

    return made


@pytest.fixture
def root(tmp_path):
    return tmp_path / "there" / "edgekd"


@pytest.fixture(scope="module")
def base(server, tmp_path_factory, keys):
    """A folder on the device with one version, deployed as it has to be. Not to be written to."""
    folder = tmp_path_factory.mktemp("base")
    file = folder / "good.edgekd"
    given = bundle.Given(Artifact.load(TINY), CPU)
    bundle.make(file, given, intended_use="research", key=keys[0].with_suffix(""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{server.folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        put(file, folder / "edgekd", key=keys[0])
    return folder / "edgekd"


@pytest.fixture
def deployed(base, root):
    """Such a folder that may be."""
    shutil.copytree(base, root, symlinks=True)
    return root


def put(file, root, **more):
    more = {"python": sys.executable} | more
    return workstation.install(file, workstation.Target("device", str(root)), **more)


def answers(root):
    """The current version, if every byte of it is right and it says what it has to."""
    folder = (root / "current").resolve()
    found = bundle.check(folder / "bundle.edgekd")
    model = Artifact.load(folder / "unpacked" / "model")
    assert found.manifest.model == model.sha256
    session = runtimes.open_session(model, found.manifest.profile)
    assert golden.verify(model, session, "onnxruntime", "CPU").ok
    assert Deployed.load(folder).bundle_sha256 == sha256(folder / "bundle.edgekd")
    return folder.name


@contextlib.contextmanager
def watched(root):
    """All the while what is current answers; which versions did, in order."""
    seen, wrong, over = [], [], threading.Event()

    def watch():
        while not over.is_set():
            try:
                seen.append(answers(root))
            except Exception as e:
                wrong.append(repr(e))
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
    assert not wrong, wrong[0]
    assert seen


def nothing_half(root):
    """Nothing in versions/ but whole versions; no link but to one."""
    for path in (root / "versions").iterdir():
        assert not path.name.startswith("."), path
        assert versions.wrong(path) == ""
    assert versions.current(root)
    assert versions.previous(root) != versions.current(root)


def test_install_again_upgrade_back(loopback, root, make, keys, tmp_path):
    first, second = make("one two"), make("next")
    found = put(first, root, key=keys[0])
    assert found.changed
    digest = sha256(first)
    assert found.current.folder == f"one-two-{digest[:12]}" == answers(root)
    assert found.current.deployed.trusted
    assert found.current.deployed.selftest.maps == pytest.approx((1, 1, 1))
    assert found.previous is None
    assert os.readlink(root / "current") == f"versions/{found.current.folder}"  # noqa: PTH115
    assert [s.split()[:2] for s in found.next] == [["sudo", "install"], ["sudo", "systemctl"]]
    shown = subprocess.run(
        [root / "current" / "edgekd", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"edgekd {edgekd.__version__}\n"
    assert not list((root / "incoming").iterdir())

    with watched(root) as seen:
        again = put(first, root, key=keys[0])
        assert not again.changed
        assert again.current == found.current
        later = put(second, root, key=keys[0])
    assert {*seen} == {found.current.folder, later.current.folder}
    assert seen == sorted(seen, key=[found.current.folder, later.current.folder].index)
    assert later.previous.folder == found.current.folder

    arguments = ["deploy", "--status", f"device:{root}", "--json"]
    told = CliRunner().invoke(app, arguments)  # the Python is the one that runs it
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["current"]["folder"] == later.current.folder

    back = CliRunner().invoke(app, ["deploy", "--rollback", f"device:{root}"])
    assert back.exit_code == 0, back.output
    assert answers(root) == found.current.folder
    assert found.current.folder in back.stdout
    nothing_half(root)
    assert not loopback.left()


def test_what_is_not_signed_as_asked_is_not_even_sent(loopback, root, make, keys):
    before = loopback.connections()
    for file, words in ((make("bare", key=None), "is not signed"), (make("a"), "is signed by")):
        with pytest.raises(EdgeKDError, match=words):
            put(file, root, key=keys[1])
    changed = make("b")
    content = bundle._read(changed)
    content["bundle.json"] = content["bundle.json"].replace(b"research", b"diagnosis")
    changed.write_bytes(bundle._zipped(content))
    with pytest.raises(EdgeKDError, match="its signature is not that of"):
        put(changed, root)
    assert loopback.connections() == before


def test_the_device_checks_for_itself(loopback, deployed, make, keys, monkeypatch):
    """Whoever had our side in hand would still need the key."""
    bad = make("bad", key=keys[1])
    fine = bundle.check(bad)
    monkeypatch.setattr(bundle, "check", lambda *_: fine)
    with watched(deployed), pytest.raises(EdgeKDError, match=r"device: .*is signed by SHA256:"):
        put(bad, deployed, key=keys[0])
    monkeypatch.undo()
    nothing_half(deployed)


def test_a_flipped_byte_and_half_an_upload(loopback, deployed, make):
    file = make("big", report=os.urandom(1_000_000))
    whole = file.read_bytes()
    part = deployed / "incoming" / f"{sha256(file)}.part"
    bad = bytearray(whole[:800_000])
    bad[12345] ^= 1
    part.write_bytes(bad)
    with watched(deployed), pytest.raises(EdgeKDError, match="is not what was sent"):
        put(file, deployed)
    assert not part.exists()
    nothing_half(deployed)
    part.write_bytes(whole[:800_000])
    (deployed / "incoming" / "other.part").write_bytes(b"given up")
    sent = []

    def track(items, what, total=None):
        for item in items:
            sent.extend([item.size] if what.startswith("copying") else [])
            yield item

    assert put(file, deployed, track=track).changed
    assert sum(sent) * 1000 == pytest.approx(len(whole) - 800_000)
    assert not list((deployed / "incoming").iterdir())


def tampered(tmp_path, name, **change):
    """The tiny model with other golden samples, hashed anew."""
    folder = tmp_path / name
    shutil.copytree(TINY, folder)
    with np.load(folder / golden.FILE) as kept:
        values = dict(kept)
    np.savez(folder / golden.FILE, **{k: change.get(k, lambda v: v)(v) for k, v in values.items()})
    art = Artifact.load(TINY)
    files = {f: sha256(folder / f) for f in art.files}
    art.model_copy(update={"files": files}).save(folder)
    return folder


def test_a_failed_self_test(loopback, deployed, make, keys, tmp_path):
    bad = tampered(tmp_path, "other", logits=lambda v: v + 0.5)
    with (
        watched(deployed),
        pytest.raises(
            EdgeKDError,
            match=r"^device: the self-test failed: golden samples are answered otherwise",
        ),
    ):
        put(make("bad", model=bad), deployed, key=keys[0])
    nothing_half(deployed)
    assert len(list((deployed / "versions").iterdir())) == 1


@pytest.fixture
def unpacked(make, tmp_path):
    def made(**more):
        folder = tmp_path / "unpacked"
        bundle.extract(make("x", **more), folder)
        return folder

    return made


def test_the_self_test(unpacked):
    found = selftest.run(unpacked())
    assert (found.runtime, found.device, found.built) == ("onnxruntime", "CPU", False)
    assert found.logits < 1e-6
    assert found.maps == pytest.approx((1, 1, 1))
    assert found.calls == 130
    assert 0 < found.p50_ms <= found.p95_ms


def change_maps(folder, change):
    with np.load(folder / bundle.EXPECTED) as kept:
        maps, answers = kept["maps"], kept["answers"]
    np.savez(folder / bundle.EXPECTED, maps=change(maps), answers=answers)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[:, ::-1],
        lambda m: np.where(np.arange(3)[:, None, None] == 1, np.nan, m),
        lambda m: np.ones_like(m),
        lambda m: m[:, :4],
    ],
    ids=["flipped", "undefined", "flat", "smaller"],
)
def test_maps_that_are_others(unpacked, change):
    folder = unpacked()
    change_maps(folder, change)
    with pytest.raises(EdgeKDError, match=r"golden sample [01] is explained otherwise"):
        selftest.run(folder)


def test_maps_that_are_undefined_on_both_sides(unpacked, monkeypatch):
    folder = unpacked()
    change_maps(folder, lambda m: np.full_like(m, np.nan))
    heat = selftest.score_cam.Heat(None, np.zeros(3), 0)
    monkeypatch.setattr(selftest.score_cam, "score_cam", lambda *_: heat)
    assert selftest.run(folder).maps == (None, None, None)


def test_a_budget_and_a_device(unpacked, make, tmp_path):
    slow = CPU.model_copy(update={"budget": Budget(latency_ms=1e-6)})
    with pytest.raises(EdgeKDError, match=r"too slow: p95 \S+ ms .*, the budget of profile cpu is"):
        selftest.run(unpacked(profile=slow))
    folder = tmp_path / "unpacked"
    manifest = bundle.Manifest.load(folder)
    other = manifest.profile.model_copy(update={"device": "Hexagon"})
    manifest.model_copy(update={"profile": other}).save(folder)
    with pytest.raises(RuntimeUnavailable, match="has no device Hexagon, only CPU"):
        selftest.run(folder)


class Builder:
    """A runtime whose files are made on the device, from ONNX."""

    SUFFIXES = (".plan",)

    @staticmethod
    def build(onnx, out, profile):
        shutil.copy(onnx, out / "model.plan")
        return [out / "model.plan"]

    devices = staticmethod(lambda: ["CPU"])

    @staticmethod
    def load(path, profile, precision, batch):
        return runtimes_onnx().load(path, profile, precision, batch)


def runtimes_onnx():
    from edgekd.runtimes import onnxruntime

    return onnxruntime


def test_what_must_be_built_on_the_device(unpacked, monkeypatch):
    folder = unpacked()
    monkeypatch.setattr(runtimes, "get", lambda _: Builder)
    found = selftest.run(folder)
    assert found.built
    built = bundle.loaded(folder)
    assert built.path == folder / "built" / "model.plan"
    assert built.parents == {"onnx": Artifact.load(TINY).sha256}
    assert selftest.run(folder).built  # and not again
    for path in (folder, folder / "built", folder / "built" / "model.plan"):
        mode = path.stat().st_mode & 0o777
        path.chmod(mode | 0o020)
        with pytest.raises(EdgeKDError, match=rf"others can write to {path}, and no signature"):
            bundle.loaded(folder)
        path.chmod(mode)
    classes = built.spec.model_copy(update={"classes": built.spec.classes[::-1]})
    for change in ({"spec": classes}, {"parents": {"onnx": "0" * 64}}, {"precision": "fp16"}):
        built.model_copy(update=change).save(folder / "built")
        with pytest.raises(EdgeKDError, match="built was not built of this bundle"):
            bundle.loaded(folder)
    shutil.rmtree(folder / "built")
    model = Artifact.load(folder / "model")
    (folder / "model" / "model.onnx").rename(folder / "model" / "model.xml")
    files = {k.replace(".onnx", ".xml"): v for k, v in model.files.items()}
    model.model_copy(update={"files": files, "precision": "int8"}).save(folder / "model")
    shutil.copytree(TINY, folder / "onnx")  # in fp32: that would be another model
    with pytest.raises(EdgeKDError, match="has no ONNX file in int8 to build from"):
        selftest.run(folder)


@pytest.fixture
def small_disk(tmp_path):
    """small_disk("size=20m"): a file system of its own, or a skip."""
    mounted = []

    def mount(options):
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"a disk of its own takes root: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder / "edgekd"

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def filled(disk, files):
    """Leave room for so many files."""
    folder = disk.parent / "others"
    folder.mkdir()
    for i in range(os.statvfs(disk.parent).f_favail - files):
        (folder / str(i)).touch()


def test_a_full_disk(loopback, make, small_disk, base):
    root = small_disk("size=60m,nr_inodes=1000")
    shutil.copytree(base, root, symlinks=True)
    for report, room, words in (
        (b"", 60, r"no room in \S+ \(.*No space left.*\): nothing was changed"),
        (os.urandom(12_000_000), 60, r"no room in \S+: \d+ MB are needed, \d+ MB are free"),
    ):
        file = make("more", report=report)
        if not (root.parent / "others").exists():
            filled(root, room)
        with watched(root), pytest.raises(EdgeKDError, match=words):
            put(file, root)
        nothing_half(root)
    shutil.rmtree(root.parent / "others")
    assert put(make("less"), root).changed  # the same disk with room


def test_a_disk_that_fills_up_meanwhile(loopback, deployed, make, tmp_path):
    """No file over a megabyte can be written there: what the check beforehand does not see."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nulimit -f 1024\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with watched(deployed), pytest.raises(EdgeKDError, match=r"no room in \S+ \(File too large\)"):
        put(make("big", report=os.urandom(3_000_000)), deployed, python=str(python))
    assert not list((deployed / "incoming").iterdir())
    nothing_half(deployed)


def cut(loopback):
    """End every connection at the server's end, at once, as where the power fails in between."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, _, rest = (process / "stat").read_text().rpartition(")")
            if "(sshd" in name:
                parents[process.name] = rest.split()[1]
    server = f"{loopback.folder}/server"
    ends = {p for p in parents if server in Path("/proc", p, "cmdline").read_text()}
    for _ in range(3):  # the session's process, and the one that watches it
        ends |= {p for p, above in parents.items() if above in ends}
    for p in ends:
        with contextlib.suppress(OSError):
            if server not in Path("/proc", p, "cmdline").read_text():
                os.kill(int(p), signal.SIGKILL)


CUTS = int(os.environ.get("EDGEKD_CUTS", "4"))


def slow(items, what, total=None):
    """A Track of a thin line: copying takes a while."""
    for item in items:
        time.sleep(0.1 if what.startswith("copying") else 0)
        yield item


def test_a_connection_that_is_cut(loopback, deployed, make):
    root = deployed
    rng = np.random.default_rng(int(os.environ.get("EDGEKD_SEED", "0")))
    started = time.monotonic()
    put(make("second", report=os.urandom(2_500_000)), root, track=slow)
    usual = time.monotonic() - started
    happened = []
    for i in range(CUTS):
        before = answers(root)
        file = make(f"cut{i}", report=os.urandom(2_500_000))
        # One within each part of the usual time, so that every step is met.
        after = usual * (i + rng.random()) / CUTS
        timer = threading.Timer(after, cut, [loopback])
        with watched(root) as seen:
            timer.start()
            try:
                put(file, root, track=slow)
                end = "done"
            except EdgeKDError as e:
                end = str(e)
            timer.cancel()
            timer.join()
            assert not loopback.left(30)  # what ran there has ended
        now = answers(root)
        assert "\n" not in end
        assert now in (before, f"cut{i}-{sha256(file)[:12]}")
        assert now != before or end != "done"
        assert {*seen} <= {before, now}
        left = [f"{p.stat().st_size} B of {p.name[-4:]}" for p in (root / "incoming").iterdir()]
        happened.append((round(after / usual, 2), now != before, len(seen), left, end[:60]))
    for line in happened:
        print(*line)  # noqa: T201 shown by -s, and where it fails
    assert put(file, root).current.folder == f"cut{CUTS - 1}-{sha256(file)[:12]}"
    nothing_half(root)
    assert not list((root / "incoming").iterdir())


def test_two_at_once(loopback, deployed, make):
    with environment.locked(deployed):
        assert environment.busy(deployed)
        with (
            watched(deployed),
            pytest.raises(
                EdgeKDError,
                match=rf"another deployment to \S+ is under way \(process {os.getpid()} since",
            ),
        ):
            put(make("more"), deployed)
    assert not environment.busy(deployed)


def test_only_so_many_are_kept(root, make, monkeypatch):
    """What is current and what was before stay, however old they are."""
    for i in range(5):
        folder = root / "versions" / f"v{i}"
        folder.mkdir(parents=True)
        made(folder, at=f"2026-01-0{i + 1}")
    (root / "versions" / "damaged").mkdir()
    for name in ("v1", "v0"):
        versions.switch(root, name)
    (root / "venv-used" / "bin").mkdir(parents=True)
    (root / "venv-other" / "bin").mkdir(parents=True)
    made(root / "versions" / "v4", at="2026-01-05", python=str(root / "venv-used/bin/python"))
    assert versions.prune(root) == ("v3", "v2", "damaged")
    assert sorted(p.name for p in (root / "versions").iterdir()) == ["v0", "v1", "v4"]
    assert sorted(p.name for p in root.glob("venv-*")) == ["venv-used"]


def made(folder, **more):
    tested = selftest.SelfTest(
        runtime="onnxruntime", device="CPU", built=False, load_ms=1, logits=0, features=0,
        tolerance=0.1, maps=(), least=1, p50_ms=1, p95_ms=1, calls=1, budget_ms=None,
    )  # fmt: skip
    values = {
        "name": folder.name, "bundle_sha256": "", "model": "", "profile": "", "precision": "",
        "edgekd": "", "source_sha256": "", "python": "", "signer": "", "trusted": False, "at": "",
        "selftest": tested,
    }  # fmt: skip
    return Deployed(**(values | more)).save(folder)


def test_back_to_what_is_damaged_or_not_there(loopback, deployed, root, make, tmp_path):
    with pytest.raises(EdgeKDError, match="nothing is deployed in"):
        workstation.status(workstation.Target("device", str(tmp_path / "nothing")))
    with pytest.raises(EdgeKDError, match="there is no previous version"):
        device_side.rollback(root)
    first = answers(root)
    second = put(make("second"), root)
    path = root / "versions" / first / "unpacked" / "model" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(EdgeKDError, match=r"good-\w+ is damaged \(model/model.onnx was changed\)"):
        device_side.rollback(root)
    assert answers(root) == second.current.folder
    path = root / "current" / "bundle.edgekd"
    path.write_bytes(path.read_bytes() + b"x")
    told = CliRunner().invoke(app, ["deploy", "--status", f"device:{root}"])
    assert told.exit_code == 1
    assert "current version is damaged (bundle.edgekd was changed)" in told.stderr
    healed = put(make("second"), root)
    assert healed.current.folder == f"{second.current.folder}.2" == answers(root)


def test_a_login_shell_that_greets(loopback, deployed):
    """What was deployed is found, though rc files print, in a shell that is not sh."""
    shell = next((s for s in ("tcsh", "fish") if shutil.which(s)), "sh")
    loopback.log_in_with(f'echo Welcome; echo hm >&2; exec {shell} -c "$SSH_ORIGINAL_COMMAND"')
    found = workstation.status(workstation.Target("shell", str(deployed)))
    assert found.current.folder == answers(deployed)


def test_a_home_folder_that_no_unit_takes(loopback, make):
    loopback.log_in_with('HOME=/home/50%; exec sh -c "$SSH_ORIGINAL_COMMAND"')
    with pytest.raises(EdgeKDError, match=r"/home/50%/edgekd has characters .* give shell:/DIR"):
        workstation.install(make("a"), workstation.Target("shell", "edgekd"))


def test_a_folder_that_runs_nothing(root, monkeypatch):
    noexec = SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_NOSUID)
    monkeypatch.setattr(os, "fstatvfs", lambda _: noexec)
    words = r"may be run .* noexec\): give another HOST:DIR"
    with pytest.raises(environment.Refused, match=words), environment.locked(root):
        pass


def test_other_versions_there_are_told(deployed, monkeypatch):
    assert not any("numpy" in note for note in device_side.status(deployed).notes)
    real = requirements.metadata.version
    monkeypatch.setattr(
        requirements.metadata, "version", lambda name: "1.26.4" if name == "numpy" else real(name)
    )
    (note,) = (n for n in device_side.status(deployed).notes if "numpy" in n)
    assert note.endswith(f"that the bundle was made with: numpy 1.26.4 ({real('numpy')})")


def wheel(folder, name, version, files):
    """A wheel by hand."""
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as made:
        for path, text in files.items():
            made.writestr(path, text)


def test_an_environment_from_wheels(loopback, root, make, tmp_path):
    """Wheels of the names that are needed; one leads to the packages that are here."""
    file = make("wheels")
    house = tmp_path / "house"
    with pytest.raises(EdgeKDError, match=r"holds no wheels: pip download -d wheelhouse .*numpy=="):
        put(file, root, wheelhouse=house)
    checked = bundle.check(file)
    here = "\n".join(p for p in sys.path if p.endswith("-packages"))
    for line in workstation.wanted(checked):
        if "python_version" in line:
            continue
        name, version = re.fullmatch(r"([\w-]+)[=>]=([\w.]+)", line).groups()
        plain = name.replace("-", "_")  # as a wheel's own name has it
        wheel(house, plain, version, {"here.pth": here} if name == "numpy" else {})
    found = put(file, root, wheelhouse=house)
    python = Path(found.current.deployed.python)
    assert python.parts[-3:-1] == (python.parent.parent.name, "bin")
    assert python.parent.parent.parent == root
    assert (python.parent.parent / environment.MADE).is_file()
    subprocess.run([root / "current" / "edgekd", "--version"], check=True, capture_output=True)
    again = put(file, root, wheelhouse=house)
    assert not again.changed
    assert again.current == found.current


def test_a_step_that_fails_says_why():
    code = "print('x'); print('ERROR: no wheel'); print('hint'); raise SystemExit(1)"
    with pytest.raises(environment.Refused, match=r"cannot do it: ERROR: no wheel$"):
        environment._run([sys.executable, "-c", code], "cannot do it")


def test_a_python_that_lacks_something(loopback, root, make, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho edgekd-python 3 10 aarch64; echo edgekd-missing $lacks\n")
    python.chmod(0o755)
    for lacks, error in (("cryptography", EdgeKDError), ("onnxruntime", RuntimeUnavailable)):
        python.write_text(
            f"#!/bin/sh\necho edgekd-python 3 10 aarch64; echo edgekd-missing {lacks}\n"
        )
        with pytest.raises(
            error, match=f"no {lacks} is there: .*pip install {lacks} there, or"
        ) as e:
            put(make("a"), root, python=str(python))
        assert "--python-version 3.10 --platform manylinux2014_aarch64" in str(e.value)
    assert not root.exists()


@pytest.mark.parametrize(
    ("text", "host", "folder"),
    [
        ("pi@ward-3", "pi@ward-3", "edgekd"),
        ("ward:", "ward", "edgekd"),
        ("ward:~/a b/", "ward", "a b"),
        ("pi@ward:/opt/edgekd", "pi@ward", "/opt/edgekd"),
        ("pi@[fe80::1]:x", "pi@fe80::1", "x"),
        ("ssh://pi@ward:2222", "ssh://pi@ward:2222", "edgekd"),
        ("ssh://pi@ward:2222/opt/x", "ssh://pi@ward:2222", "/opt/x"),
    ],
)
def test_where_to(text, host, folder):
    assert workstation.Target.parse(text) == (host, folder)


@pytest.mark.parametrize(
    "text",
    ["ward:..", "ward:/", "ward:a/../../b", "ward:$HOME", "ward:a\nb", "ward:~root/x", "ward:.",
     'ward:a"b', "ward:%h", "ward:~"],
)  # fmt: skip
def test_where_to_not(text):
    with pytest.raises(EdgeKDError, match=r"no folder to deploy to|a folder of its own"):
        workstation.Target.parse(text)


def test_no_option_is_taken_for_a_host(root, make):
    with pytest.raises(EdgeKDError, match="is no host"):
        workstation.install(make("a"), workstation.Target.parse("-oProxyCommand=x"))


def test_a_folder_that_is_not_ours(root):
    (root / "current").mkdir(parents=True)
    (root / "versions" / "v1").mkdir(parents=True)
    with pytest.raises(EdgeKDError, match="current is no link of ours"):
        versions.current(root)
    (root / "current").rmdir()
    made(root / "versions" / "v1")
    versions.switch(root, "v1")
    (root / "versions" / "v1" / "previous").symlink_to("/etc")
    with pytest.raises(EdgeKDError, match="leads to /etc, no version of ours"):
        versions.previous(root)


@pytest.mark.parametrize("name", ["../../etc", ".hidden", "a/b", "-rf", "é" * 99, ""])
def test_a_bundle_calls_itself_what_it_likes(name):
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", device_side._plain(name))


@pytest.mark.parametrize("user", ["pi", ""])
@pytest.mark.parametrize("version", [249, 255])
def test_the_unit(root, user, version, tmp_path):
    """As systemd itself reads it."""
    folder = tmp_path / "with space" / "edgekd"
    (folder / "current").mkdir(parents=True)
    (folder / "current" / "edgekd").write_text("#!/bin/sh\n")
    (folder / "current" / "edgekd").chmod(0o755)
    python = "/home/pi/venv/bin/python" if user else "/usr/bin/python3"
    groups = ("video", "render")
    made = service.text(folder, python=python, user=user and "root", systemd=version, groups=groups)
    assert ("SupplementaryGroups=video render" in made.splitlines()) == (not user)
    assert "PrivateDevices" not in made
    assert ("ProtectHome=read-only" in made) == bool(user)
    assert ("RestartSteps" in made) == (version >= 254)
    assert ("DynamicUser=yes" in made) == (not user)
    command = f'"{folder}/current/edgekd" serve "{folder}/current/bundle.edgekd"'
    for line in ("ProtectSystem=strict", "NoNewPrivileges=yes", "Type=notify",
                 f"ExecStart={command}"):  # fmt: skip
        assert line in made.splitlines()
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    path = tmp_path / service.UNIT
    path.write_text(made)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, check=False
    )
    said = [x for x in done.stderr.splitlines() if service.UNIT in x and "Restart" not in x]
    assert not said
    assert done.returncode == 0 or "Failed to" in done.stderr


def test_a_made_up_user_gets_at_the_gpu(root, monkeypatch):
    """As far as its groups are there: in one that is not, systemd starts nothing."""
    root.mkdir(parents=True)
    here = [SimpleNamespace(gr_name=name) for name in ("root", "render")]
    monkeypatch.setattr(service.grp, "getgrall", lambda: here)
    monkeypatch.setattr(service.os, "geteuid", lambda: 0)
    service.write(root, "/usr/bin/python3")
    lines = (root / service.UNIT).read_text().splitlines()
    assert "DynamicUser=yes" in lines
    assert "SupplementaryGroups=render" in lines
    monkeypatch.setattr(service.grp, "getgrall", list)
    service.write(root, "/usr/bin/python3")
    assert "SupplementaryGroups" not in (root / service.UNIT).read_text()


class Systemd:
    """As systemd does: what ends is started anew, with what is current then."""

    def __init__(self, root):
        self.root, self.started, self.broken, self.process = root, [], (), None
        self.start()

    def start(self):
        now = (self.root / "current").readlink().name
        self.started.append(now)
        argument = str(self.root / "current" / "bundle.edgekd")
        wait = "raise SystemExit(1)" if now in self.broken else "import time; time.sleep(60)"
        self.process = subprocess.Popen([sys.executable, "-c", wait, "serve", argument])

    def __call__(self, *words):
        if words[0] == "--version":
            return "systemd 252 (252.1)\n"
        if self.process.poll() is not None:
            self.start()
            return "ActiveState=activating\nMainPID=0\n" + f"NRestarts={len(self.started) - 1}\n"
        active = "activating" if self.started[-1] in self.broken else "active"
        return (
            f"ActiveState={active}\nMainPID={self.process.pid}\nNRestarts={len(self.started) - 1}\n"
        )


@pytest.fixture
def systemd(deployed, monkeypatch):
    for name in ("v1", "v2"):
        (deployed / "versions" / name).mkdir()
        made(deployed / "versions" / name, at="2026-01-01")
    found = Systemd(deployed)
    monkeypatch.setattr(service, "_systemctl", found)
    monkeypatch.setattr(service, "POLL_SECONDS", 0.05)
    yield found
    found.process.kill()
    found.process.wait()


def test_the_service_takes_what_is_current(systemd, deployed):
    first = systemd.started[0]
    found = device_side._switched(deployed, "v1")
    assert systemd.started == [first, "v1"]
    assert found.current.folder == "v1"
    assert found.previous.folder == first


def test_a_version_that_the_service_does_not_start_with(systemd, deployed):
    first = systemd.started[0]
    device_side._switched(deployed, "v1")
    systemd.broken = ("v2",)
    with pytest.raises(
        EdgeKDError, match="the service does not start with v2: v1 is current again"
    ):
        device_side._switched(deployed, "v2")
    assert (deployed / "current").readlink().name == "v1"
    assert versions.previous(deployed) == first
    assert systemd.started[-1] == "v1"
    assert "v2" in systemd.started


def test_an_end_while_the_service_starts(systemd, deployed, monkeypatch):
    """As when the device is shut down: it has not started with the new version yet."""
    first = systemd.started[0]
    systemd.broken = ("v1",)
    asked = []

    def ended(*_):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(service.time, "sleep", ended)
    with pytest.raises(KeyboardInterrupt):
        device_side._switched(deployed, "v1")
    assert versions.current(deployed) == first
    assert systemd.started[-1] == first
    assert versions.previous(deployed) is None


CUT = """
import pathlib, sys, time
from edgekd.deploy import device_side
from edgekd.remote import protocol
def restart(root):
    print("switched", flush=True, file=sys.stderr)
    time.sleep(1)
    return False
device_side.systemd.restart = restart
device_side.versions.wrong = lambda folder: ""
device_side.test = lambda *_: None
sys.exit(protocol.answer(device_side._answer, device_side.EdgeKDError))
"""


def test_a_connection_that_is_cut_while_the_service_starts(deployed):
    """What is left to do there is done, though nobody hears of it: here, to go back."""
    first = versions.current(deployed)
    (deployed / "versions" / "v1").mkdir()
    made(deployed / "versions" / "v1")
    versions.switch(deployed, "v1")
    with subprocess.Popen(
        [sys.executable, "-c", CUT], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        request = device_side.Request(command="rollback", root=str(deployed))
        process.stdin.write(request.model_dump_json() + "\n")
        process.stdin.flush()
        assert process.stderr.readline() == "switched\n"
        assert versions.current(deployed) == first
        process.stdin.close()
        assert process.wait(30) == 0
        assert f"does not start with {first}: v1 is current again" in process.stdout.read()
    assert versions.current(deployed) == "v1"
    assert versions.previous(deployed) == first


def test_a_kill_between_any_two_steps_of_a_switch(root, monkeypatch):
    """There is something current, and another version to go back to, all the while."""
    for name in ("v1", "v2", "v3"):
        (root / "versions" / name).mkdir(parents=True)
        made(root / "versions" / name)
    versions.switch(root, "v1")
    versions.switch(root, "v2")
    real = {name: getattr(Path, name) for name in ("unlink", "symlink_to", "replace")}

    def killed(name, at, steps):
        def step(self, *more, **options):
            steps.append(name)
            if len(steps) == at:
                raise KeyboardInterrupt
            return real[name](self, *more, **options)

        return step

    for at in range(1, 7):
        steps = []
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(Path, name, killed(name, at, steps))
            with pytest.raises(KeyboardInterrupt):
                versions.switch(root, "v3")
        assert (versions.current(root), versions.previous(root)) == ("v2", "v1")
    assert steps == [*real, *real]  # it was killed before each of them
    versions.switch(root, "v3")
    assert (versions.current(root), versions.previous(root)) == ("v3", "v2")


def test_another_service_is_left_alone(systemd, deployed, tmp_path):
    assert service.restart(tmp_path / "elsewhere") is None
    assert systemd.process.poll() is None


def test_what_was_deployed_serves(base, tmp_path):
    """As the service starts it, its page included, and nothing is unpacked again."""
    pytest.importorskip("fastapi", reason="pip install 'edgekd[serve]'")
    current = base / "current"
    own = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    with subprocess.Popen(
        [current / "edgekd", "serve", current / "bundle.edgekd", "--port", "0"],
        stderr=subprocess.PIPE, text=True, env=own,
    ) as process:  # fmt: skip
        try:
            url = re.search(r"http://[\d.:]+", process.stderr.readline())[0]
            with urllib.request.urlopen(f"{url}/health") as health:
                assert json.load(health)["status"] == "ok"
            with urllib.request.urlopen(url) as page:
                assert b"<title>" in page.read()
        finally:
            process.terminate()
    assert process.returncode == 0
    assert (tmp_path / "state" / "edgekd" / "audit.jsonl").is_file()
    assert not (tmp_path / "edgekd").exists()


def test_what_serving_lacks_is_said(monkeypatch):
    monkeypatch.setattr(service, "NEEDS", ("json", "no_such_package"))
    assert service.lacks() == ("no-such-package",)
