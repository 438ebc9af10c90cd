"""Official weights: their files, their names, and fetching them (from a server of our own)."""

import functools
import http.server
import json
import threading

import pytest
import safetensors.torch
import torch

from edgekd.models import checkpoints
from edgekd.ofa import spaces, supernet
from edgekd.ofa.supernet import Supernet
from edgekd.records import EdgeKDError

SPACE, OTHER = "ofa-mbv3-w1.0", "ofa-mbv3-w1.2"
HEAD = "classifier.linear.weight"
SPECIAL = "cpu_lat@10ms_top1@71.1_finetune@25"


@functools.cache
def official(space=SPACE, classes=1000):
    """Random weights of a supernet. Not to be changed."""
    torch.manual_seed(1)
    net = Supernet(space, classes)
    return {k: torch.rand_like(v) if v.is_floating_point() else v + 5
            for k, v in net.state_dict().items()}  # fmt: skip


def held(net, state):
    """Names of the tensors of `net` that are those of `state`."""
    return {k for k, v in net.state_dict().items() if k in state and torch.equal(v, state[k])}


@pytest.mark.parametrize("suffix", ["", ".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_local_file(tmp_path, suffix, wrapped):
    path, state = tmp_path / f"ofa_mbv3_w1{suffix}", official()
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 7} if wrapped else state, path)
    net = Supernet(SPACE, 1000)
    checkpoints.fill_supernet(net, checkpoints.read(path), path)
    assert held(net, state) == state.keys()


def test_files_of_2019_are_not_zip_archives(tmp_path):
    old = {f"module.{k}": v for k, v in official().items()}
    path = tmp_path / "ofa_D4_E6_K7"
    torch.save({"state_dict": old}, path, _use_new_zipfile_serialization=False)
    assert checkpoints.read(path).keys() == official().keys()


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ("blocks.3.mobile_inverted_conv.depth_conv.bn.bn.running_var",
         "blocks.3.conv.depth_conv.bn.running_var"),
        ("blocks.3.mobile_inverted_conv.point_linear.conv.conv.weight",
         "blocks.3.conv.point_linear.conv.weight"),
        ("blocks.3.conv.depth_conv.conv.7to5_matrix", "blocks.3.conv.depth_conv.conv.7to5_matrix"),
        ("blocks.0.conv.depth_conv.conv.weight", "blocks.0.conv.depth_conv.conv.weight"),
        ("first_conv.conv.weight", "first_conv.conv.weight"),
        ("classifier.linear.linear.bias", "classifier.linear.bias"),
        ("classifier.bias", "classifier.linear.bias"),
    ],
)  # fmt: skip
def test_names(given, own):
    assert list(checkpoints.normalised({given: torch.zeros(1)})) == [own]


@pytest.mark.parametrize("name", spaces.subnets())
def test_all_specialised_nets_have_a_place(name):
    """Under the names of 2020, and with MIIL's classifier, which is a convolution."""
    arch = spaces.subnets()[name]
    with torch.device("meta"):
        shapes = supernet.build(arch, 1000).state_dict()
    old = {k.replace(".conv.", ".mobile_inverted_conv.", 1) if k.startswith("blocks") else k:
           torch.full(v.shape, 0.5, dtype=v.dtype) for k, v in shapes.items()}  # fmt: skip
    old[HEAD] = old[HEAD][:, :, None, None]
    net = supernet.build(arch, 5)
    head = net.classifier.linear.weight.clone()
    checkpoints.fill_subnet(net, checkpoints.normalised(old), name)
    assert torch.equal(net.classifier.linear.weight, head)
    assert all((v == v.new_tensor(0.5)).all() for k, v in net.state_dict().items()
               if not k.startswith("classifier"))  # fmt: skip


@pytest.mark.parametrize("classes", [5, 1000])
def test_the_head_is_kept_for_as_many_classes_alone(classes):
    net, state = Supernet(SPACE, classes), official()
    fresh = net.classifier.linear.weight.clone()
    checkpoints.fill_supernet(net, state, "w1.0")
    assert state.keys() - held(net, state) == (set(checkpoints.HEAD) if classes == 5 else set())
    assert torch.equal(net.classifier.linear.weight, fresh) == (classes == 5)
    assert fresh.abs().max() < 0.05


def test_before_elastic_kernels_the_matrices_are_identities():
    state = {k: v for k, v in official().items() if not k.endswith("_matrix")}
    net = Supernet(SPACE, 1000)
    checkpoints.fill_supernet(net, state, "ofa_D4_E6_K7")
    for name, matrix in net.state_dict().items():
        if name.endswith("_matrix"):
            assert torch.equal(matrix, torch.eye(len(matrix)))
    assert held(net, state) == state.keys()


def without(key):
    return {k: v for k, v in official().items() if k != key}


MATRIX = "blocks.2.conv.depth_conv.conv.5to3_matrix"
WRONG = [
    (lambda: official(OTHER), r"first_conv.conv.weight is \(24, 3, 3, 3\) there and "
     r"\(16, 3, 3, 3\) here \(\d+ such tensors\): give a checkpoint of that space, such as "
     "ofa_mbv3_d234_e346_k357_w1.0"),
    (lambda: without(MATRIX), rf"{MATRIX} is absent there and \(9, 9\) here \(1 such"),
    (lambda: without(HEAD), rf"{HEAD} is absent there and \(5, 1280\) here \(2 such"),
    (lambda: official() | {"blocks.21.x": torch.zeros(2)}, r"blocks.21.x is \(2,\) there and abs"),
    (lambda: dict(list(official().items())[:100]), r"is absent there"),
    (lambda: official() | {HEAD: torch.zeros(1000, 8)}, rf"{HEAD} is \(1000, 8\) there and \(5, 1"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "message"), WRONG)
def test_what_does_not_fit_changes_nothing(state, message):
    net = Supernet(SPACE, 5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(EdgeKDError, match=message) as error:
        checkpoints.fill_supernet(net, state(), "w.pth")
    assert str(error.value).startswith(f"w.pth is no supernet of {SPACE}: ")
    assert "\n" not in str(error.value)
    assert held(net, before) == before.keys()


def test_a_supernet_is_no_sub_net():
    net = supernet.build(spaces.subnets()[SPECIAL], 1000)
    with pytest.raises(EdgeKDError, match=r"w.pth is another network: first_conv.conv.weight"):
        checkpoints.fill_subnet(net, official(), "w.pth")


@pytest.mark.parametrize("content", ["truncated", "text", "empty", "tensor", "no tensors", "none"])
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_files_that_are_no_weights(tmp_path, content, suffix):
    path = tmp_path / f"w{suffix}"
    torch.save(torch.zeros(9) if content == "tensor" else {"epoch": 3}, path)
    if content == "truncated":
        torch.save({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif content in ("text", "empty"):
        path.write_text("<html>" if content == "text" else "")
    elif content == "none":
        path.unlink()
    with pytest.raises(EdgeKDError, match=r"^cannot read weights .*w") as error:
        checkpoints.read(path)
    assert "\n" not in str(error.value)


def test_names_of_the_official_files():
    names = checkpoints.names()
    assert len(names) == len(set(names)) == 58
    for name, space in checkpoints.SUPERNETS.items():
        assert spaces.space_of(space), name


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A loopback server of tmp_path/site: (its URL, that folder, paths asked for)."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked, site = [], tmp_path / "site"
    site.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            file = site / self.path.strip("/").replace("/", "+")
            if not file.is_file():
                self.send_error(404)
                return
            self.send_response(200)
            body = file.read_bytes()
            if body != b"endless":
                self.send_header("Content-Length", str(len(body) + (body == b"cut off")))
            self.end_headers()
            self.wfile.write(body if body != b"endless" else b"x" * 2000)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}/ofa/", site, asked
        serving.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("ofa_mbv3_d234_e346_k357_w1.2", "ofa/ofa_nets/ofa_mbv3_d234_e346_k357_w1.2"),
        ("ofa_D34_E6_K357", "ofa/ofa_checkpoints/ofa_D34_E6_K357"),
        (SPECIAL, "ofa/ofa_specialized/cpu_lat-10ms_top1-71.1_finetune-25/init"),
    ],
)
def test_fetched_once_and_pinned(server, tmp_path, name, path):
    base, site, asked = server
    (site / path.replace("/", "+")).write_bytes(b"weights")
    file = checkpoints.fetch(name, base=base)
    assert file == tmp_path / "cache" / "edgekd" / "weights" / name.replace("@", "-")
    assert file.read_bytes() == b"weights"
    assert checkpoints.fetch(name, base=base) == checkpoints.fetch(name, offline=True) == file
    assert asked == [f"/{path}"]
    assert sorted(p.name for p in file.parent.iterdir()) == [file.name, f"{file.name}.json"]


@pytest.fixture
def fetched(server):
    """(URL, the served file, the fetched file) of one checkpoint."""
    base, site, _ = server
    served = site / "ofa+ofa_checkpoints+ofa_D4_E6_K7"
    served.write_bytes(b"weights")
    return base, served, checkpoints.fetch("ofa_D4_E6_K7", base=base)


@pytest.mark.parametrize("offline", [True, False])
def test_a_changed_file_is_refused(fetched, offline):
    base, _, file = fetched
    file.write_bytes(b"weighty")
    with pytest.raises(EdgeKDError, match=r"has changed: its sha256 .* delete .* to fetch it aga"):
        checkpoints.fetch("ofa_D4_E6_K7", base=base, offline=offline)
    file.unlink()
    if not offline:
        assert checkpoints.fetch("ofa_D4_E6_K7", base=base).read_bytes() == b"weights"


def test_another_file_under_the_old_address_is_refused(fetched):
    base, served, file = fetched
    file.unlink()
    served.write_bytes(b"weighty")
    with pytest.raises(EdgeKDError, match=r"has changed: .* delete .*json if the new file is to"):
        checkpoints.fetch("ofa_D4_E6_K7", base=base)
    assert not file.exists()


@pytest.mark.parametrize("pin", ["", "[]", '{"sha": 1}'])
def test_a_broken_pin_is_not_taken_for_one(fetched, pin):
    base, _, file = fetched
    file.with_name(f"{file.name}.json").write_text(pin)
    with pytest.raises(EdgeKDError, match=r"json holds no sha256: delete it"):
        checkpoints.fetch("ofa_D4_E6_K7", base=base)


def test_a_file_put_there_by_hand_is_pinned(tmp_path):
    (tmp_path / "ofa_D4_E6_K7").write_bytes(b"by hand")
    file = checkpoints.fetch("ofa_D4_E6_K7", offline=True, folder=tmp_path)
    assert len(json.loads(file.with_name(f"{file.name}.json").read_text())["sha256"]) == 64


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, r"cannot fetch .*ofa_D4_E6_K7 \(HTTP Error 404.*give the file with --start-weights"),
        (b"cut off", "broke off after 7 of 8 bytes: try again"),
        (b"x" * 2000, "so is no OFA file"),
        (b"endless", "so is no OFA file"),
    ],
)
def test_downloads_that_fail_leave_nothing(server, tmp_path, monkeypatch, body, message):
    base, site, _ = server
    monkeypatch.setattr(checkpoints, "LIMIT_BYTES", 1000)
    if body is not None:
        (site / "ofa+ofa_checkpoints+ofa_D4_E6_K7").write_bytes(body)
    with pytest.raises(EdgeKDError, match=message):
        checkpoints.fetch("ofa_D4_E6_K7", base=base)
    assert not (tmp_path / "cache").exists()


def test_offline_asks_no_server(server):
    base, _, asked = server
    with pytest.raises(EdgeKDError, match=r"-pretrained, or download http://.*/ofa_D4_E6_K7 "):
        checkpoints.fetch("ofa_D4_E6_K7", base=base, offline=True)
    assert asked == []


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    message = (
        r"^cannot fetch http://127.0.0.1:9/ofa_checkpoints/ofa_D4_E6_K7 \(.*refused.*--start-w"
    )
    with pytest.raises(EdgeKDError, match=message):
        checkpoints.fetch("ofa_D4_E6_K7", base="http://127.0.0.1:9", folder=tmp_path)


def test_a_folder_that_cannot_be_made(server, tmp_path, monkeypatch):
    base, site, _ = server
    (site / "ofa+ofa_checkpoints+ofa_D4_E6_K7").write_bytes(b"weights")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(EdgeKDError, match="set XDG_CACHE_HOME"):
        checkpoints.fetch("ofa_D4_E6_K7", base=base)


@pytest.mark.parametrize("name", ["../../etc/passwd", "ofa_D4_E6_K7/../x", "", "/tmp/x"])
def test_a_name_is_never_a_path(tmp_path, name):
    with pytest.raises(EdgeKDError, match="no checkpoint"):
        checkpoints.fetch(name, folder=tmp_path / "weights", offline=True)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_hears_of_the_nearest():
    with pytest.raises(EdgeKDError, match='did you mean "ofa_D4_E6_K7"') as error:
        checkpoints.fetch("ofa_D4_E6_K9")
    assert len(str(error.value)) < 600
