import pytest
from pydantic import ValidationError

from edgekd.records import Artifact, EdgeKDError, Profile, Spec, Training, shipped_profiles, store

SPEC = Spec(classes=("a", "b"), size=(8, 8))


@pytest.mark.parametrize("name", ["cpu", "intel-npu", "jetson"])
def test_shipped_profiles_read(name):
    assert Profile.read(name).name == name


def test_shipped_profiles_name_spaces_that_exist():
    from edgekd.ofa import spaces

    for name in shipped_profiles():
        assert Profile.read(name).space in spaces.SPACES


PROFILE = 'runtime="torch"\ndevice="cpu"\nstudent="ofa-595"\nresolutions=[64]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PROFILE + "thread=3\n", 'no key "thread"; did you mean "threads"'),
        (PROFILE + "[margins]\nkapa=1\n", 'margins.no key "kapa"; did you mean "kappa"'),
        (PROFILE + "[margins]\nlost=2\n", "margins.lost: .*less than or equal to 1, got 2"),
        (PROFILE + "[budget]\nlatency=3\n", 'budget.no key "latency"; did you mean "latency_ms"'),
        (PROFILE + "threads=-1\n", "threads: Input should be greater than or equal to 0, got -1"),
        ('runtime="torch"\n', "device: Field required"),
        ("runtime=\n", "is not TOML"),
    ],
)
def test_a_wrong_profile_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(EdgeKDError, match=message):
        Profile.read(str(path))


def test_a_profile_may_be_a_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE)
    assert Profile.read(str(path)).name == "mine"


def test_margins_are_the_profiles(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE + "[margins]\nkappa=0.7\n")
    found = Profile.read(str(path)).margins
    assert (found.kappa, found.identification) == (0.7, 0.95)
    assert found.sha256 != Profile.read("cpu").margins.sha256


def test_an_unknown_profile_names_the_nearest():
    with pytest.raises(EdgeKDError, match='no profile "jetsen"; did you mean "jetson"'):
        Profile.read("jetsen")
    with pytest.raises(EdgeKDError, match="cannot read profile"):
        Profile.read("nowhere/mine.toml")


def artifact(**change):
    given = {"kind": "onnx", "model": "m", "files": {"m.onnx": ""}, "spec": SPEC, "params": 1,
             "macs": 2} | change  # fmt: skip
    return Artifact.parse(given, "test")


def test_artifact_round_trip_and_tamper(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"model")
    digest = store.sha256(tmp_path / "m.onnx")
    saved = artifact(files={"m.onnx": digest}).save(tmp_path)
    assert Artifact.load(tmp_path) == saved
    assert saved.path.read_bytes() == b"model"
    assert saved.size_bytes == 5
    (tmp_path / "m.onnx").write_bytes(b"other")
    with pytest.raises(EdgeKDError, match="sha256 differs"):
        Artifact.load(tmp_path)
    (tmp_path / "m.onnx").unlink()
    with pytest.raises(EdgeKDError, match="is missing"):
        Artifact.load(tmp_path)


def test_another_files_weights_are_another_file():
    """An OpenVINO graph says nothing of its weights; what is kept beside changes nothing."""
    one = artifact(files={"model.xml": "a", "model.bin": "b", "golden.npz": "c"})
    same = artifact(files={"model.xml": "a", "model.bin": "b", "golden.npz": "d"})
    other = artifact(files={"model.xml": "a", "model.bin": "e", "golden.npz": "c"})
    assert one.sha256 == same.sha256 != other.sha256
    assert artifact(files={"m.onnx": "a", "model.pt2": "b"}).sha256 == "a"


def test_sha256_is_the_standards_test_vector(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert store.sha256(tmp_path / "f").startswith("ba7816bf8f01cfea414140de5dae2223")


@pytest.mark.parametrize("name", ["../m.onnx", "/etc/passwd", "..", ""])
def test_an_artifacts_files_stay_in_its_folder(name):
    with pytest.raises(EdgeKDError, match="is not a plain name"):
        artifact(files={name: ""})


def test_an_unfinished_folder_is_not_an_artifact(tmp_path):
    with pytest.raises(EdgeKDError, match=r"holds no artifact\.json"):
        Artifact.load(tmp_path)
    (tmp_path / "artifact.json").write_text('{"schema_version": 9}')
    with pytest.raises(EdgeKDError, match="schema version 9, this edgekd reads 1"):
        Artifact.load(tmp_path)
    (tmp_path / "artifact.json").write_text('{"schema_ver')
    with pytest.raises(EdgeKDError, match="is not JSON"):
        Artifact.load(tmp_path)


def test_records_are_frozen_and_hold_numbers():
    with pytest.raises(ValidationError):
        SPEC.size = (1, 1)
    with pytest.raises(EdgeKDError, match="finite"):
        Training.parse({"lr": float("nan")}, "x")


def test_a_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "f"
    store.write_atomic(path, "old")

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full_disk)
    with pytest.raises(EdgeKDError, match="No space left"):
        store.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeKDError, match=r"cannot write to folder .*choose another folder"):
        store.make_folder(tmp_path / "file" / "run")


@pytest.mark.parametrize("torn", ["", "0.1", '{"a": ', '{"a": \n'])
def test_a_journal_goes_on_after_the_last_whole_line(tmp_path, torn):
    path = tmp_path / "done.jsonl"
    journal = store.Journal(path, {"of": "this"})
    journal.add(0.114)
    journal.add(None)
    with path.open("a") as f:
        f.write(torn)
    again = store.Journal(path, {"of": "this"})
    assert again.done == [0.114, None]
    again.add({"b": 1})
    assert store.Journal(path, {"of": "this"}).done == [0.114, None, {"b": 1}]
    assert store.Journal(path, {"of": "that"}).done == []
    assert store.Journal(path, {"of": "this"}).done == []
