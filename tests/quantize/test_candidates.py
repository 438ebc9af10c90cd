"""The fastest file that keeps its answers: who is out, who is chosen, and why."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runtimes.test_runtimes import Tiny, artifact

from edgekd import data
from edgekd.export import onnx as export
from edgekd.pipeline import quantize
from edgekd.pipeline.export import CANDIDATES
from edgekd.quantize import candidates, halving, sensitivity
from edgekd.quantize import engines as quantizers
from edgekd.quantize.choice import EXACT, Choice, Judged, ranked, without_file
from edgekd.records import (
    Artifact,
    EdgeKDError,
    Margins,
    Metric,
    Profile,
    RuntimeUnavailable,
    Spec,
    Timing,
    make_folder,
)
from edgekd.runtimes import machine

CPU = Profile(name="cpu", runtime="openvino", device="CPU", threads=1,
              precisions=("int8", "fp32"))  # fmt: skip


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory):
    """(data set, FP32 ONNX of a network with a made-up head that tells phantoms apart a little)."""
    dataset = data.open_dataset(phantoms)
    spec = Spec(classes=dataset.classes, size=(32, 32), channels="grey")
    torch.manual_seed(1)
    module = Tiny().eval()
    made = artifact(spec=spec.model_dump())
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    return dataset, export.to_onnx(module, made, images, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def choice(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("candidates")
    made = candidates.choose(
        trained[1], trained[0], CPU, out,
        images=16, max_drop=100, engines=("nncf", "ort"), seconds=0.2, exhaustive=True,
    )  # fmt: skip
    return made, out


def test_every_candidate_ran_and_is_kept_with_its_figures(choice):
    made, out = choice
    assert made.exhaustive
    assert Choice.load(out) == made
    more = {"int8-nncf-7-bit", "int8-ort-7-bit"} if machine.overflows(made.machine.isa) else set()
    assert {c.name for c in made.candidates} == {"fp32", "int8-nncf", "int8-ort"} | more
    for c in made.candidates:
        assert Artifact.load(out / c.name).sha256 == c.artifact_sha256
        assert c.p50_ms > 0
        assert c.turns >= candidates.ROUNDS * 20
        assert c.drop_pt is not None
        assert c.agreement is not None
    fp32 = next(c for c in made.candidates if c.name == "fp32")
    assert (fp32.flips, fp32.drop_pt.value) == (0, 0)
    assert fp32.agreement == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("isa", "device", "more"),
    [(("avx2",), "CPU", {"int8-nncf-7-bit", "int8-ort-7-bit"}),
     (("avx2", "avx512f"), "CPU", {"int8-nncf-7-bit", "int8-ort-7-bit"}),
     (("avx2",), "NPU", set()), (("avx2", "avx_vnni"), "CPU", set()), (("asimd",), "CPU", set())],
)  # fmt: skip
def test_weights_of_seven_bits_are_tried_where_eight_overflow(tmp_path, isa, device, more):
    here = machine.this().model_copy(update={"isa": isa})
    profile = CPU.model_copy(update={"device": device})
    engines = quantizers.names()
    found = set(candidates._ways(artifact(), None, profile, tmp_path, engines, here))
    assert found == {"fp32", "int8-nncf", "int8-ort", "int8-inc"} | more
    both = set(candidates._ways(artifact(), artifact(), profile, tmp_path, engines, here))
    assert both - found == {f"{n}-qat" for n in found - {"fp32"}}


def test_the_fastest_of_those_that_hold_is_chosen(choice):
    made, _ = choice
    chosen = [c for c in made.candidates if c.state == "chosen"]
    assert [c.name for c in chosen] == [made.chosen]
    hold = [c for c in made.candidates if c.state in ("chosen", "slower", "no faster")]
    assert chosen[0].times <= candidates.CLEARLY * min(c.times for c in hold)
    exact = {c.name: EXACT.index(c.precision) for c in hold}
    faster = [c.name for c in hold if c.times < chosen[0].times]
    assert all(exact[name] > exact[made.chosen] for name in faster)
    assert [c.times for c in made.candidates] == sorted(c.times for c in made.candidates)
    assert next(c.times for c in made.candidates if c.name == "fp32") == 1


def test_by_halving_all_are_in_the_record_with_why_and_when_they_went_out(choice, trained):
    """In the same folder: files that were made before are not made again."""
    before, out = choice
    times = {f: f.stat().st_mtime_ns for f in out.glob("int8-*/*")}
    made = candidates.choose(trained[1], trained[0], CPU, out, images=16, max_drop=100,
                             engines=("nncf", "ort"), seconds=0.2)  # fmt: skip
    assert {f: f.stat().st_mtime_ns for f in out.glob("int8-*/*")} == times
    assert not made.exhaustive
    assert {c.name for c in made.candidates} == {c.name for c in before.candidates}
    for c in made.candidates:
        assert (c.out_at is None) == (c.state == "chosen") == (c.name == made.chosen)
        assert c.turns >= 20  # nobody lost answers
        assert c.reason
        if c.out_at == "turns":
            assert re.search(r" x the time of \S+ after \d+ turns", c.reason)
        if c.agreement is None and c.name != "fp32":
            assert c.reason.endswith("; not explained")
    full = {c.name: c for c in before.candidates}
    for c in made.candidates:  # what both asked for is the same
        assert (c.drop_pt, c.flips) == (full[c.name].drop_pt, full[c.name].flips)
        assert c.agreement in (None, full[c.name].agreement)
    before.save(out)  # for the other tests


def judged(name, ms, *, drop=0.0, agreement=1.0, precision="int8", asked=0.8):
    made = artifact(precision=precision, kind="onnx", files={f"{name}.onnx": name.ljust(64, "0")})
    j = Judged(name, made, Metric(value=drop, low=None, high=None), 0, agreement, asked)
    timing = Timing.model_construct(artifact_sha256=made.sha256, precision=precision,
                                    samples_ms=(ms,) * 20, block_medians_ms=(ms,) * 4)  # fmt: skip
    return j, timing


def rows(monkeypatch, *given, max_drop=1.0, untimed=(), late=None):
    monkeypatch.setattr(Artifact, "size_bytes", property(lambda self: 1))
    timed = {j.name: halving.figures(t, given[0][1]) for j, t in given if j.name not in untimed}
    found = ranked([j for j, _ in given], timed, max_drop, late or {})
    return {r.name: r for r in found}


def test_what_was_never_asked_is_said(monkeypatch):
    """Out by their answers, one of them with time; out by time, with and without maps."""
    behind = halving.Late("d", 1.4, 1.32, 1.47, 20)
    found = rows(
        monkeypatch,
        judged("fp32", 4.0, precision="fp32", agreement=None),
        judged("a", 1.0, drop=1.1, agreement=None),
        judged("b", 1.0, drop=1.2, agreement=None),
        judged("c", 2.8, agreement=None),
        judged("d", 2.0),
        judged("e", 2.9),
        judged("f", 1.5, agreement=0.7),
        untimed=["b"],
        late={"c": behind, "e": behind},
    )
    told = {n: (r.state, r.out_at, r.reason) for n, r in found.items()}
    far = "1.40 [1.32, 1.47] x the time of d after 20 turns"
    lost = "points lost on validation, 1 allowed"
    assert told == {
        "a": ("loses accuracy", "answers", f"1.1 {lost}; not explained"),
        "f": ("explains otherwise", "explanations", "agreement 0.70, under 0.8"),
        "d": ("chosen", None, "the fastest that keeps accuracy and explanations"),
        "c": ("slower", "turns", f"{far}; not explained"),
        "e": ("slower", "turns", far),
        "fp32": ("slower", "timing", "2.00 x the time of d"),
        "b": ("loses accuracy", "answers", f"1.2 {lost}; neither explained nor timed"),
    }
    assert list(told) == ["a", "f", "d", "c", "e", "fp32", "b"]
    never = found["b"]
    assert (never.turns, never.times, never.p50_ms, never.p95_ms) == (None,) * 4


def test_what_time_put_out_is_not_chosen_whatever_its_few_turns_say(monkeypatch):
    late = {"a": halving.Late("b", 1.2, 1.15, 1.25, 20)}
    found = rows(monkeypatch, judged("fp32", 4.0, precision="fp32"), judged("a", 1.9),
                 judged("b", 2.0), late=late)  # fmt: skip
    assert (found["a"].state, found["b"].state) == ("slower", "chosen")


def course(monkeypatch, tmp_path, max_drop=1.0, mend=None, **files):
    """(rows, who was explained, who ran in each round, what was to be mended).

    files: of each candidate its ms, points lost and agreement.
    """
    monkeypatch.setattr(Artifact, "size_bytes", property(lambda self: 1))
    files = {"fp32": (4.0, 0.0, 1.0)} | files
    explained, rounds, mended = [], [], []
    mine = []
    for name, (ms, drop, _) in files.items():
        j, _ = judged(name, ms, drop=drop, precision="fp32" if name == "fp32" else "int8",
                      agreement=None)  # fmt: skip
        engine = "inc" if name.startswith("inc") else "ort"
        j.artifact.settings.update(engine=engine, method="min-max")
        mine.append(j)

    def explain(j, shared):
        explained.append(j.name)
        return j._replace(agreement=files[j.name][2])

    def measure(runners, how, *, seed, track):
        rounds.append([next(iter(r.artifact.files))[: -len(".onnx")] for r in runners])
        rng = np.random.default_rng(seed)
        turns = [tuple(files[n][0] * rng.lognormal(0, 0.01, 20)) for n in rounds[-1]]
        return [Timing.model_construct(samples_ms=x, block_medians_ms=x, noise=(), yardstick_ms=())
                for x in turns]  # fmt: skip

    def mend(small, shared, out, allowed, mend=mend):
        mended.append(sorted(j.name for j in small))
        if mend is None:
            return None
        files["mended"] = mend
        j, _ = judged("mended", mend[0], drop=mend[1], agreement=mend[2])
        return j

    monkeypatch.setattr(candidates, "explained", explain)
    monkeypatch.setattr(candidates.bench, "measure", measure)
    monkeypatch.setattr(candidates, "mended", mend)
    shared = SimpleNamespace(profile=CPU, seed=0, track=candidates.untracked)
    found = candidates._halved(mine, shared, tmp_path, max_drop, 0.1)
    return {r.name: r for r in found}, explained, rounds, mended


def test_answers_first_then_a_few_turns_then_explanations_of_the_fastest(monkeypatch, tmp_path):
    found, explained, rounds, mended = course(
        monkeypatch, tmp_path, a=(2.0, 0.0, 0.9), b=(3.0, 0.0, 0.9), inc=(1.0, 5.0, 0.9),
    )  # fmt: skip
    assert rounds == [["fp32", "a", "b"]]  # inc lost its answers, and keeps no layers: not timed
    assert explained == ["a"]
    assert mended == []
    assert {n: r.state for n, r in found.items()} == {
        "a": "chosen", "b": "slower", "fp32": "slower", "inc": "loses accuracy",
    }  # fmt: skip
    assert found["inc"].reason.endswith("; neither explained nor timed")


def test_what_is_mended_is_timed_beside_those_that_are_left(monkeypatch, tmp_path):
    """As in the exhaustive run: the faster one that is out, and what is chosen anew."""
    files = {"a": (1.0, 3.0, 0.9), "b": (2.0, 0.0, 0.9), "c": (3.0, 0.0, 0.9)}
    found, explained, rounds, mended = course(monkeypatch, tmp_path, mend=(1.5, 0.0, 0.9), **files)
    assert mended == [["a"]]
    assert explained == ["b"]
    assert rounds == [["fp32", "a", "b", "c"], ["fp32", "b", "mended"]]
    assert found["mended"].state == "chosen"
    assert found["b"].reason.split(" x ")[1] == "the time of mended after 20 turns"
    assert found["c"].reason.split(" x ")[1] == "the time of b after 20 turns; not explained"
    slow, *_ = course(monkeypatch, tmp_path, mend=(2.5, 0.0, 0.9), **files)
    assert slow["b"].state == "chosen"
    assert slow["mended"].state == "slower"


def test_what_is_out_and_slower_is_not_mended(monkeypatch, tmp_path):
    _, _, _, mended = course(monkeypatch, tmp_path, a=(3.0, 3.0, 0.9), b=(2.0, 0.0, 0.9))
    assert mended == []


def test_of_files_that_lose_as_much_the_one_with_the_nearest_maps_is_mended(monkeypatch):
    """They were not asked for maps before, as their answers put them out."""
    maps = {"a": 0.5, "b": 0.9, "c": 0.99}
    monkeypatch.setattr(candidates, "explained",
                        lambda j, shared: j._replace(agreement=maps.pop(j.name)))  # fmt: skip
    given = [judged(n, 1, drop=d, agreement=None)[0]
             for n, d in (("a", 2.0), ("b", 2.0), ("c", 3.0))]  # fmt: skip
    assert candidates._nearest(given, None, 1.0).name == "b"
    assert set(maps) == {"c"}
    assert candidates._nearest(given[2:], None, 1.0).name == "c"
    assert set(maps) == {"c"}  # alone it need not be asked


def test_what_loses_accuracy_or_explains_otherwise_is_out_however_fast(monkeypatch):
    found = rows(
        monkeypatch,
        judged("fp32", 4.0, precision="fp32"),
        judged("a", 1.0, drop=1.1),
        judged("b", 1.5, agreement=0.79),
        judged("c", 2.0, agreement=float("nan")),
        judged("d", 3.0, drop=1.0, agreement=0.8),
    )
    assert {n: r.state for n, r in found.items()} == {
        "a": "loses accuracy", "b": "explains otherwise", "c": "explains otherwise",
        "d": "chosen", "fp32": "slower",
    }  # fmt: skip
    assert found["a"].reason == "1.1 points lost on validation, 1 allowed"
    assert found["fp32"].reason == "1.33 x the time of d"


def test_the_interval_of_what_is_lost_is_told(monkeypatch):
    def given(name, ms, drop, low, high):
        j, timing = judged(name, ms, drop=drop)
        return j._replace(drop=Metric(value=drop, low=low, high=high)), timing

    fp32 = judged("fp32", 4.0, precision="fp32")
    found = rows(monkeypatch, fp32, given("a", 1.0, 1.2, 0.3, 2.1), given("b", 2.0, 0.4, -0.4, 1.2))
    assert found["a"].reason == "1.2 points [0.3, 2.1] lost on validation, 1 allowed"
    assert found["b"].state == "chosen"
    assert found["b"].reason.endswith(
        "; 0.4 points [-0.4, 1.2] lost: too few images to exclude more than 1"
    )
    sure = rows(monkeypatch, fp32, given("b", 2.0, 0.4, -0.1, 0.9))
    assert sure["b"].reason == "the fastest that keeps accuracy and explanations"


def test_without_maps_to_compare_fp32_is_what_is_left(monkeypatch):
    blind = float("nan")
    found = rows(
        monkeypatch,
        judged("fp32", 2.0, precision="fp32", agreement=blind),
        judged("a", 1.0, agreement=blind),
    )
    assert found["fp32"].state == "chosen"
    assert found["a"].state == "explains otherwise"


def test_int8_that_is_slower_than_fp32_is_not_chosen(monkeypatch):
    found = rows(monkeypatch, judged("fp32", 2.0, precision="fp32"), judged("a", 3.0))
    assert found["fp32"].state == "chosen"


def test_a_candidate_is_timed_in_several_processes(trained, monkeypatch):
    _, source = trained
    seeds = []

    def measure(runners, how, *, seed, **more):
        assert (how.seconds, how.throughput) == (0.5, False)
        seeds.append(seed)
        return [Timing.model_construct(artifact_sha256=r.artifact.sha256, yardstick_ms=(1.0,),
                                       samples_ms=(float(seed),), block_medians_ms=(seed + 0.5,))
                for r in runners]  # fmt: skip

    monkeypatch.setattr(candidates.bench, "measure", measure)
    j = Judged("fp32", source, Metric(value=0, low=None, high=None), 0, 1.0, 0.8)
    shared = SimpleNamespace(profile=CPU, seed=7, track=candidates.untracked)
    (timed,) = candidates._timed([j], shared, 0.5).values()
    assert seeds == [7, 8, 9]
    assert timed == halving.Timed(times=1, p50_ms=8, p95_ms=pytest.approx(8.9), turns=3)


def test_the_first_turns_are_a_quarter_and_tell_p95():
    how = candidates._how(2.0, first=True)
    assert (how.seconds, how.least, how.within, how.throughput) == (0.5, 130, None, False)
    assert candidates._how(2.0, first=False).seconds == 2


def test_what_is_fastest_is_told_turn_by_turn(monkeypatch):
    """A machine with a slow day in half of the turns: the medians of all turns are no guide."""

    def turns(given, *factors):
        j, timing = given
        ms = timing.samples_ms[0]
        blocks = [ms * f for f in factors]
        return j, timing.model_copy(update={"samples_ms": blocks, "block_medians_ms": blocks})

    found = rows(
        monkeypatch,
        turns(judged("fp32", 4.0, precision="fp32"), 1, 1, 1.6, 1.6, 1),
        turns(judged("a", 2.0), 1, 1, 1.6, 1.6, 1),
        turns(judged("b", 1.8), 1, 1.6, 1.6, 1.6, 1),  # of its own median 1.6
    )
    assert found["b"].p50_ms > found["a"].p50_ms
    assert found["b"].state == "chosen"
    assert found["b"].times == 1.8 / 4
    assert found["a"].reason == "1.11 x the time of b"


def test_nothing_can_be_compared_where_fp32_does_not_run(trained, tmp_path, monkeypatch):
    def fails(*given, **more):
        raise EdgeKDError("no such operator")

    monkeypatch.setattr(candidates.export, "to_runtime", fails)
    with pytest.raises(EdgeKDError, match="FP32 itself does not run in openvino: no such oper"):
        candidates.choose(trained[1], trained[0], CPU, tmp_path, images=16, max_drop=1, engines=())
    assert not (tmp_path / Choice.FILE).exists()


def test_of_files_as_fast_the_most_exact_is_chosen(monkeypatch):
    """A hundredth is noise, and was what made INT8 slower than FP32 when it was timed again."""
    bf16 = judged("bf16", 1.99, precision="bf16")
    found = rows(monkeypatch, judged("fp32", 2.03, precision="fp32"), bf16, judged("a", 1.97))
    assert list(found) == ["a", "bf16", "fp32"]
    assert found["bf16"].state == "chosen"
    assert found["a"].state == "no faster"
    assert found["a"].reason == "0.99 x the time of bf16, which is more exact"
    assert found["fp32"].state == "slower"
    clear = rows(monkeypatch, judged("fp32", 2.05, precision="fp32"), judged("a", 2.0))
    assert clear["a"].state == "chosen"


def test_what_cannot_be_made_is_told_and_the_rest_goes_on(trained, tmp_path, monkeypatch):
    def fails(*given):
        raise EdgeKDError("no such operator")

    monkeypatch.setattr(quantizers.get("ort"), "write", fails)
    made = candidates.choose(trained[1], trained[0], CPU, tmp_path, images=16, max_drop=100,
                             engines=("ort",))  # fmt: skip
    assert made.chosen == "fp32"
    lost = next(c for c in made.candidates if c.name == "int8-ort")
    assert (lost.state, lost.reason, lost.p50_ms) == ("does not run", "no such operator", None)


@pytest.mark.parametrize("same", [True, False])
def test_a_choice_of_another_kind_of_machine_is_not_taken_again(
    choice, trained, tmp_path, monkeypatch, same
):
    made, _ = choice
    before = made if same else made.model_copy(
        update={"machine": made.machine.model_copy(update={"isa": ("neon",)})}
    )  # fmt: skip
    before.save(make_folder(tmp_path / CANDIDATES))
    monkeypatch.setattr(candidates, "choose", lambda *a, **k: "measured anew")
    record = SimpleNamespace(profile=CPU, seed=0)
    run = SimpleNamespace(folder=tmp_path, record=record, track=candidates.untracked)

    def told(exhaustive):
        return quantize._choice(
            run, trained[0], trained[1], made.images, made.max_drop, None,
            seconds=made.seconds, exhaustive=exhaustive, force=False,
        )  # fmt: skip

    assert told(True) == told(False) == (made if same else "measured anew")
    before.model_copy(update={"exhaustive": False}).save(tmp_path / CANDIDATES)
    assert told(True) == "measured anew"
    assert (told(False) == "measured anew") != same


def test_an_absent_device_is_an_error_not_another_machines_choice(trained, tmp_path):
    npu = CPU.model_copy(update={"device": "NPU"})
    with pytest.raises(RuntimeUnavailable, match="auto measures on the device, and"):
        candidates.choose(trained[1], trained[0], npu, tmp_path, images=16, max_drop=1)
    assert not list(tmp_path.iterdir())


def test_the_profile_says_how_alike_explanations_must_be():
    for asked, lost in ((0.8, False), (0.9, True)):
        j, _ = judged("int8-ort", 1, agreement=0.85, asked=asked)
        assert (j.lost(1.0) is not None) == lost
    assert j.lost(1.0) == ("explains otherwise", "agreement 0.85, under 0.9")
    nothing, _ = judged("int8-ort", 1, agreement=float("nan"))
    assert nothing.lost(1.0)[0] == "explains otherwise"


def test_a_destroyed_copy_loses_accuracy_or_explanations(trained, tmp_path):
    """The gate of the choice fails what it must: other weights under the same name."""
    dataset, source = trained
    shared = candidates._shared(source, dataset, CPU, 16, 0, candidates.untracked)
    torch.manual_seed(99)
    other = export.to_onnx(Tiny().eval(), artifact(spec=source.spec.model_dump()),
                           shared.calibration[:4], tmp_path)  # fmt: skip
    small = {"precision": "int8"}  # FP32 is what is compared with: it is never out
    found = candidates.judge("other", other.model_copy(update=small), shared)
    assert found.lost(1.0) is not None
    assert found.flips > 0
    assert candidates.judge("same", source.model_copy(update=small), shared).lost(1.0) is None


def test_the_costliest_layer_is_found_and_put_back(tmp_path):
    """One layer is given weights that INT8 ruins; sparing that one alone mends the file."""
    torch.manual_seed(0)
    module = Tiny().eval()
    with torch.no_grad():
        hurt = module.body[5].weight  # the last 1x1: one giant weight makes the others round to 0
        hurt[:, 0] *= 400
    images = np.random.default_rng(0).standard_normal((24, 3, 32, 32)).astype(np.float32)
    images *= 0.05
    source = export.to_onnx(module, artifact(), images, tmp_path / "onnx")
    from edgekd.export import graphs
    from edgekd.quantize import ptq

    def make(keep, calibration, out):
        return ptq.quantize(source, calibration, out, engine="ort", runtime="openvino",
                                 keep=keep)  # fmt: skip

    log = tmp_path / "costs.jsonl"
    costs = sensitivity.sensitivity(source, CPU, make, images, images, log)
    assert len(costs) == len(graphs.layers(source.path))
    assert [c.left for c in costs] == sorted(c.left for c in costs)
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:3])  # killed while it wrote the last
    again = []

    def counted(keep, *given):
        again.append(keep)
        return make(keep, *given)

    assert sensitivity.sensitivity(source, CPU, counted, images, images, log) == costs
    assert again == [[graphs.layers(source.path)[-1]]]
    tried = []

    def holds(made):
        tried.append(made.settings["keep"])
        return made if len(tried) == 2 else None

    found = sensitivity.repair(source, CPU, make, holds, images, images, tmp_path / "mended")
    assert [len(k) for k in tried] == [1, 2]
    assert tried[0] == [costs[0].layer]
    assert found.settings["keep"] == [c.layer for c in costs[:2]]
    told = rf"not mended by 2 of {len(costs)} layers .*most: {costs[0].layer}"
    with pytest.raises(EdgeKDError, match=told):
        sensitivity.repair(source, CPU, make, lambda made: None, images, images, tmp_path / "m")
    assert not (tmp_path / "m" / "artifact.json").exists()


OUT = ("loses accuracy", "much")


@pytest.mark.parametrize("exhaustive", [False, True])
@pytest.mark.parametrize(
    ("lost", "ms", "times"), [(None, 1.0, 0), (OUT, 1.0, 1), (OUT, 1.97, 0), (OUT, 9.0, 0)]
)
def test_repair_is_tried_only_where_int8_that_is_out_is_clearly_the_fastest(
    trained, tmp_path, monkeypatch, lost, ms, times, exhaustive
):
    asked, seen = [], []

    def made_up(runners, how, *, seed, track):
        each = [ms if r.artifact.precision == "int8" else 2.0 for r in runners]
        seen.append(each)
        return [Timing.model_construct(samples_ms=(x,) * 20, block_medians_ms=(x,) * 20, noise=(),
                                       yardstick_ms=()) for x in each]  # fmt: skip

    monkeypatch.setattr(candidates.bench, "measure", made_up)
    monkeypatch.setattr(candidates, "mended", lambda *a: asked.append(a))
    monkeypatch.setattr(Judged, "lost", lambda self, m: None if self.name == "fp32" else lost)
    choice = candidates.choose(trained[1], trained[0], CPU, tmp_path, images=16, max_drop=100,
                               engines=("ort",), exhaustive=exhaustive)  # fmt: skip
    assert len(asked) == times
    assert len(seen) == (candidates.ROUNDS if exhaustive else 1 if ms != 1.97 else 4)
    assert choice.chosen == ("int8-ort" if lost is None else "fp32")


def test_what_is_mended_is_the_nearest_of_those_that_can_be(trained, tmp_path, monkeypatch):
    """Not inc's, which keeps no layers: asked for first, it left a network without any INT8."""
    asked = []
    monkeypatch.setattr(sensitivity, "repair", lambda *a, **k: asked.append(a[-1].name))
    out = [judged("int8-inc", 1, drop=-1.0, agreement=0.7),
           judged("int8-nncf", 1, drop=3.0, agreement=0.9),
           judged("int8-ort", 1, drop=0.5, agreement=0.78)]  # fmt: skip
    for j in out:
        j[0].artifact.settings.update(engine=j[0].name.partition("-")[2], method="min-max")
    small = [j[0] for j in out]
    shared = candidates._shared(trained[1], trained[0], CPU, 16, 0, candidates.untracked)
    candidates.mended(small, shared, tmp_path, 1.0)
    assert candidates.mended(small[:1], shared, tmp_path, 1.0) is None
    assert asked == ["int8-ort-repaired"]


def test_what_cannot_be_mended_is_told_with_what_was_tried(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "MOST", 0.3)
    dataset, source = trained
    beyond = Margins().model_copy(update={"kappa": 1.1})  # none can be
    shared = candidates._shared(source, dataset, CPU.model_copy(update={"margins": beyond}), 16, 0,
                                candidates.untracked)  # fmt: skip
    j, _ = judged("int8-ort-7-bit", 1, asked=1.1)
    j.artifact.settings.update(engine="ort", method=quantizers.NARROW)
    told = candidates.mended([j], shared, tmp_path, 100.0)
    assert (told.name, told.state, told.engine) == (
        "int8-ort-7-bit-repaired", "explains otherwise", "ort",
    )  # fmt: skip
    assert re.match(
        r"agreement 0\.\d\d, under 1\.1; not mended by [12] of \d layers in FP32; those that cost",
        told.reason,
    )
    assert told.p50_ms is None
    assert told.agreement is not None
    assert not told.artifact_sha256


@pytest.mark.parametrize(
    ("name", "precision", "engine"),
    [("bf16", "bf16", ""), ("int8-ort", "int8", "ort"), ("int8-ort-qat", "int8", "ort")],
)
def test_what_was_not_made_has_its_engines_name(name, precision, engine):
    told = without_file(name, "why")
    assert (told.precision, told.engine, told.state) == (precision, engine, "does not run")


@pytest.mark.parametrize(
    ("given", "message"),
    [({"seconds": 1.0}, "--seconds is of timing candidates"),
     ({"exhaustive": True}, "--exhaustive is of all candidates: leave it out, or --engine")],
)  # fmt: skip
def test_one_engine_leaves_nothing_to_choose(given, message):
    asked = {"engine": "ort", "method": None, "images": 8, "max_drop": 1.0, "seconds": None,
             "exhaustive": False, "qat": 0, "force": False}  # fmt: skip
    run = SimpleNamespace(record=SimpleNamespace(profile=CPU))
    with pytest.raises(EdgeKDError, match=message):
        quantize.quantize(run, **asked | given)
