"""The spaces against published figures and against the reference code (package `ofa`)."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.models import zoo
from edgekd.ofa import spaces, supernet
from edgekd.ofa.encoding import Genome
from edgekd.records import Arch, EdgeKDError

FACTS = Path(__file__).parents[3] / "shared" / "facts" / "ofa_specialized.json"


def test_ofa_595_is_the_published_network():
    name, arch = supernet.named("OFA-595")
    assert name == "flops@595M_top1@80.0_finetune@75"
    net = supernet.build(arch, 1000)
    assert len(net.state_dict()) == 417
    assert zoo.count(net, (236, 236)) == (9_135_928, 595_189_032)
    assert round(zoo.count(net, (224, 224))[1] / 1e4) == 51_286


@pytest.mark.parametrize(("classes", "params"), [(3, 7_603_539), (5, 7_606_613), (14, 7_620_446)])
def test_ofa_595_with_a_medical_head(classes, params):
    net = supernet.build(supernet.named("ofa-595")[1], classes)
    assert sum(p.numel() for p in net.parameters()) == params


@pytest.mark.parametrize(
    ("space", "params", "macs"),
    [
        ("ofa-mbv3-w1.0:min", 3_410_792, 121_278_672),
        ("ofa-mbv3-w1.0:max", 7_664_760, 566_170_656),
        ("ofa-mbv3-w1.2:min", 4_602_456, 193_078_200),
        ("ofa-mbv3-w1.2:max", 10_701_632, 843_101_040),
    ],
)
def test_the_ends_of_a_space(space, params, macs):
    net = supernet.build(supernet.named(space)[1], 1000)
    assert zoo.count(net, (224, 224)) == (params, macs)


def test_all_fifty_published_nets():
    if not FACTS.exists():
        pytest.skip(f"{FACTS} is not here")
    facts = json.loads(FACTS.read_text())
    ours = supernet.subnets()
    assert len(ours) == 50
    for fact in facts.values():
        match = [
            a for a in ours.values()
            if a.resolution == fact["image_size"] and list(a.depth[:5]) == fact["d"]
            and list(a.kernel[:20]) == [k or 0 for k in fact["ks"]]
            and list(a.expand[:20]) == [e or 0 for e in fact["e"]]
        ]  # fmt: skip
        assert match
    for arch, fact in zip(ours.values(), (facts[k] for k in sorted(facts)), strict=True):
        with torch.device("meta"):
            net = supernet.build(arch, 1000)
        assert zoo.count(net, (arch.resolution,) * 2) == (fact["params"], fact["macs"])


@pytest.mark.parametrize("space", ["ofa-mbv3-w1.0", "ofa-mbv3-w1.2", "ofa-proxyless-w1.3"])
def test_logits_equal_the_reference_code(space):
    """Same weights by the same names, a random Arch: same logits as the `ofa` package's sub-net."""
    zoo = pytest.importorskip("ofa.imagenet_classification.elastic_nn.networks")
    width = float(space.rsplit("w", 1)[1])
    kind = zoo.OFAMobileNetV3 if "mbv3" in space else zoo.OFAProxylessNASNets
    big = kind(
        n_classes=7, dropout_rate=0, width_mult=width,
        ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4],
    )  # fmt: skip
    rng = random.Random(0)
    places = len(big.blocks) - 1
    kernel = [rng.choice([3, 5, 7]) for _ in range(places)]
    expand = [rng.choice([3, 4, 6]) for _ in range(places)]
    depth = [rng.choice([2, 3, 4]) for _ in range(5)]
    big.set_active_subnet(ks=kernel, e=expand, d=depth)
    theirs = big.get_active_subnet(preserve_weight=True).eval()
    tail = () if "mbv3" in space else (1,)
    arch = Arch(space=space, kernel=kernel, expand=expand, depth=(*depth, *tail), resolution=64)
    ours = supernet.build(arch, 7).eval()
    torch.manual_seed(0)
    state = {
        k: torch.rand_like(v) + 0.5 if "running_var" in k else torch.randn_like(v.float()) * 0.1
        for k, v in theirs.state_dict().items()
    }
    theirs.load_state_dict(state)
    ours.load_state_dict(state)  # strict: names and shapes are the reference's
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), atol=1e-5, rtol=1e-5)


def test_the_head_sees_the_last_map():
    net = supernet.build(supernet.named("cpu_lat@10ms")[1], 3).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = net.maps(image)
        torch.testing.assert_close(net.head(maps[-1]), net(image))
    assert [m.shape[2] for m in maps] == [16, 8, 4, 4, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpu_lat@10", "cpu_lat@10ms_top1"),
        ("note10", "could be any of"),
        ("cpu_lat@12ms", 'no sub-net "cpu_lat@12ms"; did you mean "cpu_lat@1'),
    ],
)
def test_names(name, message):
    if name == "cpu_lat@10":
        assert supernet.named(name)[0].startswith(message)
    else:
        with pytest.raises(EdgeKDError, match=message):
            supernet.named(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": "ofa-mbv3"}, 'no space "ofa-mbv3"; did you mean'),
        ({"depth": (5, 2, 2, 2, 2, 1)}, "no stage of depth 5"),
        ({"kernel": (9,) * 21}, "no kernel 9"),
        ({"kernel": (3,) * 20}, "6 depths and 21 kernels"),
    ],
)
def test_an_arch_outside_its_space_is_refused(change, message):
    arch = supernet.named("cpu_lat@10ms")[1].model_copy(update=change)
    with pytest.raises(EdgeKDError, match=message):
        supernet.build(arch, 3)


def test_a_space_within_a_network_has_nothing_larger():
    largest = spaces.uniform("ofa-lite0", "max")
    assert largest.kernel == (3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3)  # Lite0's
    assert largest.depth == (2, 2, 3, 3, 4, 1)
    smallest = spaces.uniform("ofa-lite0", "min")
    assert (set(smallest.kernel), smallest.depth) == ({3}, (1, 1, 2, 2, 2, 1))
    rng = random.Random(0)
    drawn = [spaces.sample("ofa-lite0", rng, [64]) for _ in range(50)]
    for arch in drawn:
        assert all(k <= most for k, most in zip(arch.kernel, largest.kernel, strict=True))
        spaces.check(arch)
    assert {a.kernel[2] for a in drawn} == {3, 5}
    assert {a.depth for a in drawn} > {drawn[0].depth}
    larger = largest.model_copy(update={"kernel": (5, *largest.kernel[1:])})
    with pytest.raises(EdgeKDError, match=r"no kernel 5 .* there \(kernels \(3,\)"):
        supernet.build(larger, 3)


def test_a_sub_net_within_a_network_is_a_slice_of_it():
    net = supernet.Supernet("ofa-lite1", 5).eval()
    arch = spaces.sample("ofa-lite1", random.Random(1), [64])
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.extract(arch)(image), net(image, arch))
    assert not [n for n in net.state_dict() if n.endswith("7to5_matrix")]


def test_genes_of_a_space_within_a_network_come_back():
    genome = Genome("ofa-lite2", (64, 96))
    rows = genome.canonical(genome.sample(200, np.random.default_rng(0)))
    archs = genome.decode(rows)
    assert (genome.encode(archs) == rows).all()
    assert genome.decode(genome.ends())[-1] == spaces.uniform("ofa-lite2", "max", 96)


@pytest.mark.parametrize(("value", "rounded"), [(4, 8), (20.8, 24), (52, 56), (83.2, 80), (27, 32)])
def test_make_divisible(value, rounded):
    assert spaces.make_divisible(value) == rounded
