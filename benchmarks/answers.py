"""What each result file says: in a sentence or two, and in full."""

from __future__ import annotations

from typing import NamedTuple


class Told(NamedTuple):
    """What a benchmark found."""

    short: str  # in a sentence or two
    more: tuple[str, ...] = ()  # lines: tables, and how they are read


def interval(metric: dict) -> str:
    """A figure and its 95 % interval."""
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def rows(*lines: list[str]) -> list[str]:
    """A table: its head, then its rows."""
    head, *rest = [f"| {' | '.join(cells)} |" for cells in lines]
    return [head, "|---" * len(lines[0]) + "|", *rest]


def line(result: dict) -> Told:
    """The whole line: what it costs and what it keeps."""
    head = ["", "network", "balanced accuracy [95 %]", "parameters", "MACs", "size", "p50", "p95",
            "agreement (stranger's)", "energy in tumour / its area"]  # fmt: skip
    shown = []
    for row in result["table"]:
        cells = [
            row["model"], f"{row['name']} {row['precision']}", interval(row["balanced_accuracy"]),
            f"{row['params'] / 1e6:.2f} M", f"{row['macs'] / 1e6:.0f} M",
        ]  # fmt: skip
        if "p95_ms" in row:
            r, e = row["pearson"], row["enrichment"]
            cells += [
                f"{row['size_bytes'] / 1e6:.1f} MB", f"{row['p50_ms']:.2f} ms",
                f"{row['p95_ms']:.2f} ms", f"{r['value']:.2f} ({r['null']:.2f})",
                f"{e['value']:.1f} x ({e['null']:.1f} x)",
            ]  # fmt: skip
        shown.append(cells + [""] * (len(head) - len(cells)))
    return Told(
        "Real MRI slices (three tumour classes, 488 test images, 128 px), a published sub-net "
        "trained alone:",
        (
            *rows(head, *shown),
            "",
            "Agreement: Pearson correlation with the teacher's map of the same image, and in "
            "brackets with that of another patient with the same answer; the last column likewise.",
        ),
    )


def once_for_all(result: dict) -> Told:
    """One supernet for three profiles."""
    f = result["figures"]
    head = ["profile", "sub-net", "parameters", "MACs", "as cut", "fine-tuned", "the same alone"]
    shown = [
        [row["profile"], f"{row['name']}{' (estimated)' if row['estimated'] else ''}",
         f"{row['params'] / 1e6:.2f} M", f"{row['macs'] / 1e6:.0f} M",
         *(interval(row[k]) for k in ("cut", "finetuned", "alone"))]
        for row in result["table"]
    ]  # fmt: skip
    ends = [", ".join(f"{f[f'{name}_{e}']:.3f}" for e in ("min", "mid", "max"))
            for name in ("warm", "scratch")]  # fmt: skip
    tuned = ", ".join(f"{row['finetuned']['value']:.3f}" for row in result["table"])
    alone = ", ".join(f"{row['alone']['value']:.3f}" for row in result["table"])
    return Told(
        f"One supernet (`ofa-lite-w1.0`, {f['shrink_warm_minutes']:.0f} minutes from "
        f"EfficientNet-Lite0) for three profiles: balanced accuracy {tuned}, of networks trained "
        f"alone {alone}. Supernet, three searches and three fine-tunings took "
        f"{f['once_minutes']:.0f} minutes, three trainings alone {f['alone_minutes']:.0f} "
        f"({f['cost_ratio']:.2f} x).",
        (
            *rows(head, *shown),
            "",
            f"Smallest, middle and largest sub-net as cut: {ends[0]}; of a supernet from scratch, "
            f"as many steps: {ends[1]}.",
        ),
    )


def latency_prediction(result: dict) -> Told:
    """What a latency table predicts."""
    f = result["figures"]
    return Told(
        "Latency of 50 sub-nets that the table had not seen: INT8 off by "
        f"{f['mape_int8']:.1f} % on average, "
        f"{100 * f['within10_int8']:.0f} % within 10 %, rank correlation {f['kendall_int8']:.2f}; "
        f"FP32 {f['mape_fp32']:.1f} %, {100 * f['within10_fp32']:.0f} %, {f['kendall_fp32']:.2f}. "
        f"The plain sum of blocks is off by {f['mape_plain_sum_int8']:.0f} % (INT8). Calibration "
        f"took {f['calibrate_s']:.0f} s."
    )


def search(result: dict) -> Told:
    """What the search finds and costs."""
    f = result["figures"]
    ours = [100 * (row["searched_at_its_latency"] - row["accuracy"]) for row in result["table"]
            if row["name"] != "chosen" and row["searched_at_its_latency"] is not None]  # fmt: skip
    beside = (
        f" At the latency of each of the {len(ours)} networks that OFA's authors published for a "
        f"CPU and a Jetson TX2 it holds one that is {min(ours):.1f} to {max(ours):.1f} points more "
        "accurate on these data, by prediction."
    )
    return Told(
        f"A search of {f['evaluations']:.0f} sub-nets takes {f['search_s']:.1f} s; its front has "
        f"{f['hypervolume_ratio_random']:.2f} times the hypervolume of as many random "
        f"ones.{beside if ours else ''}"
    )


def papers(result: dict) -> Told:
    """Teacher, student alone and distilled, on three sets."""
    f = result["figures"]
    head = ["set", "teacher", "student alone", "student distilled", "gain [95 %]", "MACs",
            "time to explain"]  # fmt: skip
    shown, gains = [], []
    for row in result["table"]:
        name, gain = row["set"], {k: 100 * row["gain"][k] for k in ("value", "low", "high")}
        points = f"{gain['value']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}] points"
        gains.append(f"{points} on {name}")
        kinds = [f"{f[f'{name}_{k}']:.3f} ± {row['spread'][k]:.3f}" for k in ("alone", "distilled")]
        shown.append([
            name, f"{f[f'{name}_teacher']:.3f}", *kinds,
            points,
            f"1/{row['macs']['vgg19_over_student']:.0f} of VGG19's",
            f"1/{f[f'{name}_explain_ratio']:.1f} of the teacher's",
        ])  # fmt: skip
    return Told(
        f"What distillation adds, {result['seeds']} seeds: {', '.join(gains)}.",
        (
            "Teacher: EfficientNet-Lite0; student: the middle sub-net of `ofa-lite-w1.0`, from the "
            "same ImageNet weights. Test balanced accuracy, mean ± spread:",
            "",
            *rows(head, *shown),
        ),
    )


def distill_speed(result: dict) -> Told:
    """What a teacher costs a step."""
    told = [
        f"beside {row['teacher']} a step that replays its answers runs at "
        f"{row['images_per_s']['replay']:.0f} images/s, a plain PyTorch loop at "
        f"{row['images_per_s']['plain']:.0f}, the student alone at "
        f"{row['images_per_s']['alone']:.0f}"
        for row in result["table"]
    ]
    return Told(f"Speed of a student's step: {'; '.join(told)}.")


def quantize(result: dict) -> Told:
    """What each precision costs in either runtime, and which was chosen."""

    def cell(row: dict) -> str:
        fp32 = row["candidate"] == "fp32"
        time = f"{row['p50_ms']:.2f} ms" if fp32 else f"x {row['times']:.2f}"
        return f"{time}, {row['deployed']:.3f}"

    names = [n for n in ("fp32", "bf16", "int8-nncf", "int8-ort", "int8-inc")
             if any(row["candidate"] == n for row in result["table"])]  # fmt: skip
    shown = []
    for net, runtime in dict.fromkeys((r["net"], r["runtime"]) for r in result["table"]):
        own = {r["candidate"]: r for r in result["table"]
               if (r["net"], r["runtime"]) == (net, runtime)}  # fmt: skip
        chosen = next(n for n, r in own.items() if r["state"] == "chosen")
        cells = [cell(own[n]) if "times" in own.get(n, {}) else "-" for n in names]
        more = "" if chosen in names else f" ({cell(own[chosen])})"
        shown.append([net, runtime, *cells, chosen + more])
    regret = f"{100 * result['figures']['auto_regret']:.1f}"
    best = "each time the best that it could have taken"
    if regret != "0.0":
        best = f"what was at most {regret} % slower than the best that it could have taken"
    f = result["figures"]
    halved = ""
    if "choices_alike" in f:
        halved = (
            f" By successive halving it took {f['choice_s'] / 60:.0f} minutes where an exhaustive "
            f"choice took {f['choice_s_exhaustive'] / 60:.0f}, and chose the same file in "
            f"{f['choices_alike']:.0f} of {f['choices']:.0f} cases."
        )
    return Told(
        f"Of every precision in two runtimes `edgekd quantize` took {best}.{halved}",
        (
            "p50 of FP32 and what share of its time the others take, turn by turn; balanced "
            "accuracy on the test split. What is faster than the chosen one had lost more than a "
            "point of the validation split, or explained otherwise:",
            "",
            *rows(["network", "runtime", *names, "chosen"], *shown),
        ),
    )


def scorecam_speed(result: dict) -> Told:
    """Seconds of a map, by the libraries and on each file."""
    ways = list(dict.fromkeys(row["way"] for row in result["table"]))
    shown = []
    for net in dict.fromkeys(row["net"] for row in result["table"]):
        own = {row["way"]: row for row in result["table"] if row["net"] == net}
        cells = [net]
        for way in ways:
            row = own.get(way)
            share = f", {100 * row['share']:.0f} %" if row and "share" in row else ""
            cells.append(f"{row['wall_s']:.2f} s{share}" if row else "-")
        shown.append(cells)
    f = result["figures"]
    return Told(
        "Score-CAM of one image at 224 pixels, same layer, ResNet-18 deployed as INT8: exact "
        f"{f['speedup_exact_resnet18']:.1f} times as fast as the faster library, fast "
        f"{f['speedup_fast_resnet18']:.1f} times.",
        (
            "The libraries on torch, then EdgeKD, exact on each file, and fast at the share of "
            "channels that was certified:",
            "",
            *rows(["network", *ways], *shown),
        ),
    )


def verdict(result: dict) -> Told:
    """What passes and what does not, of each student."""
    shown = []
    for student in result["students"]:
        own = [r for r in result["table"] if f"{r['set']} {r['net']}" == student]
        its = result | {"table": own}
        for honest in (True, False):
            mine = [r for r in own if r["honest"] is honest]
            states = [r["state"] for r in mine]
            counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(sorted(states)))
            odd = [f"{r['case']}: {r['state']}" for r in mine if (r["state"] == "pass") != honest]
            shown.append([student, "honest" if honest else "broken", counts,
                          passes(its, honest)[1], "; ".join(odd) or "-"])  # fmt: skip
    files, resamples = zip(*(passes(result, honest) for honest in (True, False)), strict=True)
    return Told(
        f"The verdict lets {files[0]} honest files pass, and {files[1]} that were broken on "
        f"purpose; of resamples of their patients {resamples[0]} and {resamples[1]}.",
        (
            "On 100 test images and on 20 resamples of their patients each. Honest: exported "
            "again, FP32 in each runtime, bfloat16, INT8 weights, and the INT8 that `edgekd "
            "quantize` let pass. Broken: another head, permuted labels, a random network, wrong "
            "calibration, another student, another layer, wrong preparation, a planted marker:",
            "",
            *rows(["student", "files", "verdicts", "resamples that pass", "not as wished"], *shown),
            "",
            between(result),
            "",
            *looks(result["table"]),
        ),
    )


def explanation_kd(result: dict) -> Told:
    """What a student inherits, plain and masked."""
    f, table = result["figures"], []

    def told(one: dict, key: str) -> str:
        return "-" if key not in one else "{:.2f} [{:.2f}, {:.2f}]".format(*one[key])

    for r in result["table"]:
        for way in ("plain", "masked"):
            one = r[way]
            over = one["energy_over_teacher"]
            energy = "-" if over is None else f"{over:.2f}"
            table.append(
                [f"{r['set']} {r['net']}, seed {r['seed']}", way, f"{one['accuracy']:.3f}",
                 told(one, "shared_kappa"), told(one, "shared_identification"),
                 told(one, "shared_lost"), told(one, "kappa"), energy,
                 f"{r['epoch_cost']:.2f}" if way == "masked" else "1"]
            )  # fmt: skip
    heads = ["student", "way", "accuracy", "shared kappa", "identification", "lost",
             "own maps' kappa", "energy in masks / teacher's", "epoch"]  # fmt: skip
    return Told(
        f"Taught its teacher's answers to masked images, a student agrees with its teacher's "
        f"reasons by kappa {f['kappa_masked']:.2f} where plain distillation gives "
        f"{f['kappa_plain']:.2f} (worst set); accuracy {f['accuracy_gain_pt']:+.1f} points, an "
        f"epoch {f['epoch_cost']:.2f} times as long.",
        ("", *rows(heads, *table)),
    )


def chain(result: dict) -> Told:
    """Which students pass, and which gates hold the others."""
    f, table = result["figures"], []
    for r in result["table"]:
        kappa = r["agreement"].get("shared_kappa")
        shown = "-" if kappa is None else "{:.2f} [{:.2f}, {:.2f}]".format(*kappa)
        table.append(
            [r["name"], {True: "honest", False: "planted", None: "guided"}[r["honest"]],
             f"{r['accuracy']:.3f}", shown, r["distillation"],
             "-" if r["honest"] is False else ", ".join(r["files"].values()),
             "; ".join(x.partition(": ")[2] for x in r["missed"]) or "-"]
        )  # fmt: skip
    heads = ["student", "made", "accuracy", "shared kappa", "distillation", "whole chain",
             "gates not passed"]  # fmt: skip
    return Told(
        f"Of {f['students']:.0f} students made with default settings {f['chain_passed']:.0f} pass "
        f"the whole chain and {f['chain_failed']:.0f} fail; of {f['planted_students']:.0f} planted "
        f"ones {f['planted_students_passed']:.0f} pass.",
        ("", *rows(heads, *table)),
    )


def passes(result: dict, honest: bool) -> tuple[str, str]:
    """How many files pass, honest ones or broken, and how many resamples of their patients."""
    mine = [r for r in result["table"] if r["honest"] is honest]
    files = sum(r["state"] == "pass" for r in mine)
    resamples = sum(r["repeats"].get("pass", 0) for r in mine)
    asked = result["figures"]["repeats"] * len(mine)
    return f"{files} of {len(mine)}", f"{resamples} of {asked:.0f}"


def between(result: dict) -> str:
    """Where the margins lie, between what is honest and what is broken."""

    def ends(honest: bool, name: str) -> list[float]:
        return [r["figures"][name][0] for r in result["table"] if r["honest"] is honest
                and r["step"] == "quantisation" and name in r["figures"]]  # fmt: skip

    margins = result["margins"]
    kappa, lost = ((ends(True, k), ends(False, k)) for k in ("kappa", "lost"))
    return (
        f"The margins lie between: kappa of honest files {min(kappa[0]):.2f} and more, of broken "
        f"ones {max(kappa[1]):.2f} at most, at least {margins['kappa']:g} is asked; maps lost "
        f"{max(lost[0]):.2f} at most, {min(lost[1]):.2f} and more, at most {margins['lost']:g} is "
        "allowed."
    )


def looks(table: list[dict]) -> list[str]:
    """Where the maps of teacher, student and deployed file look, beside what they should see."""

    def figure(row: dict, name: str, form: str) -> str:
        value, low, high, null = row["figures"][name]
        return f"{form} [{form}, {form}] ({form})".format(value, low, high, null)

    files = {"teacher": "teacher", "student": "student, FP32",
             "int8 that quantize lets pass": "deployed, INT8"}  # fmt: skip
    shown = []
    for student in dict.fromkeys((r["set"], r["net"]) for r in table):
        own = {r["case"]: r for r in table if (r["set"], r["net"]) == student}
        for case, title in files.items():
            if "energy" in own.get(case, {"figures": {}})["figures"]:
                cells = [figure(own[case], name, form) for name, form in (
                    ("energy", "{:.2f}"), ("enrichment", "{:.1f}"), ("hit", "{:.2f}"))]  # fmt: skip
                shown.append([" ".join(student), title, *cells])
    return [
        "Energy of the maps inside the mask (a planted finding, a tumour, the lungs), that over "
        "the mask's share of the picture, and the pointing game, with 95 % intervals and in "
        "brackets what another patient's map of the same answer has there:",
        "",
        *rows(["student", "file", "energy inside", "times its area", "peak inside"], *shown),
    ]


def stopwatch(result: dict) -> Told:
    """How far the stopwatch can be believed."""
    f = result["figures"]
    caught = {k.removeprefix("caught_"): v for k, v in f.items() if k.startswith("caught_")}
    told = "; ".join(f"{k.replace('_', ' ')}: {100 * v:.0f} %" for k, v in caught.items())
    return Told(
        "The same benchmark five times: a file's own times lie within "
        f"{100 * f['time_spread']:.0f} %, its ratio to itself within "
        f"{100 * f['ratio_spread_mid_int8_again_mid_int8']:.1f} %, ratios of two small files "
        f"within {100 * f['ratio_spread_mid_int8_min_fp32']:.1f} %, and of a large to a small one, "
        "which a machine that others share slows down unequally, within "
        f"{100 * f['ratio_spread']:.1f} %. Builds that `bench --against` "
        "calls slower, of 20 tries each, beside another file in turns and beside a record: "
        f"{told}."
    )


def latency_peers(result: dict) -> Told:
    """The chosen file beside what is deployed without EdgeKD."""
    f = result["figures"]
    shown = []
    for r in sorted(result["table"], key=lambda r: r["times"]):
        right = r["balanced_accuracy"]
        shown.append([r["file"], "-" if right is None else f"{right:.3f}", f"{r['p50_ms']:.2f} ms",
                      f"{r['times']:.2f} [{r['low']:.2f}, {r['high']:.2f}]",
                      f"{r['rest_ms']:.1f} ms"])  # fmt: skip
    best, fastest = f["speedup_over_best_peer"], f["speedup_over_fastest_peer"]
    head = ["file", "balanced accuracy", "p50", "times the chosen file's",
            "a call after 2 s of rest"]  # fmt: skip
    return Told(
        f"The file that EdgeKD chose for the `cpu` profile is {best:.2f} times as fast as the best "
        f"of what one would deploy without it ({result['best_peer']}), at "
        f"{f['accuracy_minus_best_peer_pt']:+.1f} points of balanced accuracy "
        f"[{f['accuracy_minus_best_peer_low_pt']:+.1f}, "
        f"{f['accuracy_minus_best_peer_high_pt']:+.1f}]; {fastest:.2f} times "
        f"as fast as the fastest ({result['fastest_peer']}), at "
        f"{f['accuracy_minus_fastest_peer_pt']:+.1f} points; "
        f"{f['accuracy_minus_most_accurate_peer_pt']:+.1f} points beside the most accurate; "
        f"{f['speedup_over_vgg19']:.0f} times as fast as VGG19 in FP32.",
        (
            f"{result['chosen']}, {result['size']} px, real MRI slices. Accuracies of it and of "
            f"Lite0 are means of {len(result['table'][0]['trainings'])} trainings, which differ by "
            f"{f['accuracy_sd_pt']:.1f} points (the best peer's by "
            f"{f['accuracy_sd_best_peer_pt']:.1f}; standard deviation). It is at "
            f"{f['roofline_fraction']:.2f} of what this machine can do, the best peer at "
            f"{f['roofline_fraction_best_peer']:.2f}. Lite0 begins from ImageNet weights, as the "
            "chosen file's supernet did; the other three at random:",
            "",
            *rows(head, *shown),
        ),
    )


def footprint(result: dict) -> Told:
    """What a device carries, and how long it waits."""
    f = result["figures"]
    head = ["environment", "installed", "`predict`, memory at most", "with a map",
            "`serve`, memory at most", "cold `predict`", "a bare script"]  # fmt: skip
    shown = []
    for row in result["table"]:
        own = {k: f[f"{k}_{row['runtime']}"] for k in (
            "installed_mb", "predict_peak_mb", "explain_peak_mb", "serve_peak_mb", "cold_ms",
            "cold_bare_ms")}  # fmt: skip
        memory = [f"{v:.0f} MB" for k, v in own.items() if k.endswith("_mb")]
        times = [f"{v / 1e3:.2f} s" for k, v in own.items() if k.endswith("_ms")]
        shown.append([f"`edgekd[{row['extras']}]`", *memory, *times])
    least = min(result["table"], key=lambda row: f[f"installed_mb_{row['runtime']}"])["runtime"]
    return Told(
        f"On a device, without torch: {f[f'installed_mb_{least}']:.0f} MB installed; `predict` "
        f"takes {f[f'predict_peak_mb_{least}']:.0f} MB of memory and "
        f"{f[f'cold_ms_{least}'] / 1e3:.2f} s from the start of its process, a bare script "
        f"{f[f'cold_bare_ms_{least}'] / 1e3:.2f} s.",
        (
            "What is installed, Python left out; memory; and from the start of a process to its "
            "answer to one image, of `edgekd predict`, which checks the bundle and knows what is "
            "unusual, beside a script of ten lines for the same file:",
            "",
            *rows(head, *shown),
        ),
    )


def serve_load(result: dict) -> Told:
    """200 clients."""
    f = result["figures"]
    return Told(
        f"`edgekd serve` asked by {f['clients']:.0f} clients at a time for {f['seconds']:.0f} s, "
        f"on the cores that the clients take too (network: {result['bundle']}): "
        f"{f['answers_per_s']:.0f} answers a second, p50 "
        f"{f['predict_p50_ms']:.0f} and p99 {f['predict_p99_ms']:.0f} ms, "
        f"{f.get('status_503', 0):.0f} refused until later, memory at most "
        f"{max(f['memory_mb_first_half'], f['memory_mb_second_half']):.0f} MB, "
        f"{f['answers_missing_in_audit'] + f['answers_missing_after_kill']:.0f} answers missing "
        "in the audit log, a kill included."
    )


def unusual(result: dict) -> Told:
    """What is warned of."""
    kinds = dict.fromkeys(r["kind"] for r in result["table"])
    nets = list(dict.fromkeys(r["learnt"] for r in result["table"]))
    shown = []
    for kind in kinds:
        own = {r["learnt"]: r for r in result["table"] if r["kind"] == kind}
        cells = [f"{100 * own[n]['warned']:.0f} % ({own[n]['auroc']:.2f}, "
                 f"{own[n]['auroc_unsure']:.2f})" if n in own else "-" for n in nets]  # fmt: skip
        shown.append([kind, *cells])
    own = max(r["warned"] for r in result["table"] if r["kind"] == "its own")
    others = [r["warned"] for r in result["table"] if r["kind"] in (*nets, "lc25000_subset")]
    return Told(
        f"`edgekd predict` warns of {100 * min(others):.0f} % of images of another modality, and "
        f"of at most {100 * own:.0f} % of its own.",
        (
            "The share that it warns of, and in brackets the AUROC of its score, and of one minus "
            "the network's own probability:",
            "",
            *rows(["images", *nets], *shown),
        ),
    )


def leakage(result: dict) -> Told:
    """What a random split adds."""
    f = result["figures"]
    return Told(
        f"LC25000, split by tile cluster: {f['lc25000_grouped']:.3f}; image by image: "
        f"{f['lc25000_random']:.3f}. The {f['lc25000_gap_pt']:.1f} points between are copies of "
        "training images in the test split."
    )


def serve_abuse(result: dict) -> Told:
    """Bombs, slow clients, fuzzing."""
    f = result["figures"]
    broken = sum(row["statuses"].get("500", 0) for row in result["table"])
    return Told(
        "`edgekd serve` abused by bombs, huge and slow bodies, wrong tokens and "
        f"{f['fuzzed']:.0f} fuzzed requests: {broken} answers of 500, {f['lines_on_stderr']:.0f} "
        f"lines on stderr, {f['files_outside']:.0f} files outside its folder; memory at "
        f"most {f['memory_mb_peak']:.0f} MB; honest clients were "
        f"answered in {f['honest_p50_ms']:.0f} ms (p50) meanwhile."
    )


def dicom_headers(result: dict) -> Told:
    """Values that scanners write wrongly."""
    f = result["figures"]
    wrong = f["off"] + f["shown_wrongly"] + f["refused_wrongly"] + f["unclear_lines"]
    return Told(
        f"Of {f['files']:.0f} DICOM files made up around wrong, odd and missing values, "
        f"{f['shown']:.0f} give the picture of an independent reading (at most "
        f"{f['most_levels_off']:.0f} grey level off) and {f['refused']:.0f} one line that says "
        f"why not; {f['tracebacks']:.0f} tracebacks, {wrong:.0f} otherwise wrong."
    )


def folders(result: dict) -> Told:
    """Made-up folders and tables."""
    f = result["figures"]
    return Told(
        f"Of {f['folders']:.0f} folders and tables made up around what systems leave behind, "
        f"`data check` refused {f['refused']:.0f} with a reason and passed {f['passed']:.0f}, of "
        f"which {f['trained']:.0f} were prepared and trained; {f['wrong']:.0f} ended otherwise."
    )
