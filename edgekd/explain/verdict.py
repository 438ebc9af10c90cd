"""Do the explanations survive this step of compression? Declared margins, and nothing else.

Non-inferiority, gate by gate: a bound of the 95 % interval has to keep the margin. All have to
hold, so no correction for their number is due. What cannot be seen by the method, or on so few
images, is said and not passed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from edgekd.records import Aggregate, Comparison, Gate, Margins, State, Step, Verdict, held, worst

ELSEWHERE = (  # remedies of a model that looks elsewhere
    "where images have masks, teach a teacher from the organ alone, and distil: edgekd teach "
    "--set guided=1",
    "see where the classes come from: edgekd data check; films of each class from each hospital",
    "cut the images to the organ, and teach the teacher again",
)
REMEDIES = {
    "quantisation": (
        "take a more exact precision: edgekd export --precision bf16 (or fp16)",
        "let layers go back to FP32: edgekd quantize (--engine auto repairs what does not hold)",
        "train with INT8 in the loop: edgekd quantize --qat 5",
        "distil a student that loses less: another seed, or relu6 in place of h-swish",
    ),
    "distillation": (
        "teach the reasons: edgekd distill --start tf_efficientnet_lite0 (networks from scratch do "
        "not inherit them), --set masked=3, --epochs 24",
        "train longer, or with the teacher's attention: edgekd distill --set attention=1",
        "check the data for markers and borders that go with one class: edgekd data check; where "
        "images have masks, teach the teacher where to look: edgekd teach --set guided=1",
        "take a larger student: a profile with a wider budget",
    ),
}  # fmt: skip

# Of each step: (key of Comparison.aggregate and of Margins, in words, whether more is better).
AGREEMENT: dict[Step, tuple[tuple[str, str, bool], ...]] = {
    "quantisation": (
        ("kappa", "agreement of maps beyond strangers'", True),
        ("identification", "own image's map told from strangers'", True),
        ("lost", "maps that could be a stranger's", False),
    ),
    "distillation": (
        ("shared_kappa", "agreement of answers under the same masks beyond strangers'", True),
        ("shared_identification", "own image's map through the same masks told from strangers'",
         True),
        ("shared_lost", "maps through the same masks that could be a stranger's", False),
    ),
}  # fmt: skip


def judge(
    step: Step,
    reference: Comparison,
    other: Comparison,
    margins: Margins,
    accuracy: Aggregate | None,
) -> Verdict:
    """Of the step from `reference` to `other`, whose `paired` figures are of the two.

    accuracy: balanced, of the first model on the test split; None if it was not judged.
    """
    valid = list(_valid(reference, margins)) + list(_valid(other, margins))
    if accuracy is not None:
        valid.append(_gate("reference_accuracy", f"balanced accuracy of {reference.name}",
                           accuracy, margins.reference_accuracy, least=True))  # fmt: skip
    valid = [g.model_copy(update={"state": "invalid"}) if g.state == "fail" else g for g in valid]
    kept = list(_kept(step, reference, other, margins)) + list(_looks(reference, other, margins))
    state: State = worst([g.state for g in (*valid, *kept)])
    gates = (*valid, *kept)
    return Verdict(
        step=step,
        reference=reference.name,
        state=state,
        sentence=_sentence(step, reference.name, other, state, gates),
        gates=gates,
        remedies=_remedies(step, kept) if state == "fail" else (),
    )


def _valid(model: Comparison, margins: Margins) -> Iterator[Gate]:
    """Can the method be used on this model? Says nothing of compression."""
    c = model.checks
    if (a := c.get("random_head")) and a.null is not None:
        yield _gate(f"random_head of {model.name}",
                    "likeness of maps with a random head's", a, a.null, least=False)  # fmt: skip
    if a := c.get("above_random"):
        yield _gate(f"above_random of {model.name}", "insertion less deletion beyond random maps'",
                    a, 0.0, least=True)  # fmt: skip
    if a := c.get("repeatable"):
        yield _gate(f"repeatable of {model.name}", "agreement of maps after another rounding",
                    a, margins.repeatable, least=True)  # fmt: skip
    if a := c.get("undefined"):
        counted = a.model_copy(update={"low": a.value, "high": a.value})
        yield _gate(f"undefined of {model.name}", "images without a map", counted,
                    margins.undefined, least=False)  # fmt: skip


def _kept(step: Step, reference: Comparison, other: Comparison, margins: Margins) -> Iterator[Gate]:
    """What the step has to keep. Maps need to be the same where the weights are. A student masks
    an image by other channels than its teacher; it is asked through its teacher's.
    """
    paired, agreement = other.paired, other.aggregate
    accuracy, faithfulness, localisation = (
        (margins.student_accuracy_pt, margins.student_faithfulness, margins.student_localisation)
        if step == "distillation"
        else (margins.accuracy_pt, margins.faithfulness, margins.localisation)
    )
    if a := paired.get("accuracy_pt"):
        yield _gate("accuracy_pt", f"points of balanced accuracy beyond {reference.name}'s",
                    a, -accuracy, least=True)  # fmt: skip
    if step == "quantisation" and (a := paired.get("answers")):
        yield _gate("answers", "test images answered alike", a, margins.answers, least=True)
    for key, what, least in AGREEMENT[step]:
        if a := agreement.get(key):
            yield _gate(key, what, a, getattr(margins, key), least=least)
    if a := paired.get("faithful"):
        yield _gate("faithful", f"insertion less deletion beyond {reference.name}'s",
                    a, -faithfulness, least=True)  # fmt: skip
    if a := paired.get("energy"):
        what = f"energy inside the masks beyond {reference.name}'s, as a share of it"
        yield _gate("energy", what, a, -localisation, least=True)
    for key, a in other.checks.items():
        if key.startswith("shortcut: "):
            yield _shortcut(key, a, paired.get(key), margins)


def _looks(reference: Comparison, other: Comparison, margins: Margins) -> Iterator[Gate]:
    """Do they look elsewhere? Asked of the reference too where no step before has asked it: a
    student of a teacher that does cannot be told to be better.

    The organ around a lesion may tell something of it, so the margin without lesions is another.
    """
    whose = [(other, "elsewhere")]
    if reference.verdict is None:
        whose.insert(0, (reference, f"elsewhere of {reference.name}"))
    for c, name in whose:
        if a := c.checks.get("elsewhere"):
            share = c.checks["survive_without"]
            what = (
                f"answers that survive without the {c.region}, beyond chance ({c.name}: "
                f"{100 * share.value:.0f} % survive, {100 * (share.null or 0):.0f} % by chance)"
            )
            margin = margins.elsewhere_lesion if c.region == "lesion" else margins.elsewhere
            yield _gate(name, what, a, margin, least=False)


def _remedies(step: Step, gates: Sequence[Gate]) -> tuple[str, ...]:
    """What to try, in this order."""
    missed = [_of_looks(g) for g in gates if g.state == "fail"]
    found = ELSEWHERE if any(missed) else ()
    return found if all(missed) else (*found, *REMEDIES[step])


def _of_looks(g: Gate) -> bool:
    """Whether the gate is one of `_looks`."""
    return g.name.partition(" of ")[0] == "elsewhere"


def _shortcut(key: str, own: Aggregate, more: Aggregate | None, margins: Margins) -> Gate:
    """A marker may move the answer by so much; by more only as far as it moved the reference's."""
    what = f"what {key.partition(': ')[2]!r} moves the answer beyond a flat patch"
    gate = _gate(key, what, own, margins.shortcut, least=False)
    if gate.state == "pass" or more is None:
        return gate
    beside = _gate(key, f"{what}, less the reference's", more, margins.shortcut_more, least=False)
    return gate if worst([gate.state, beside.state]) == beside.state else beside


def _gate(name: str, what: str, found: Aggregate, margin: float, *, least: bool) -> Gate:
    """What was found, beside its margin."""
    state = held(found.low, found.high, margin, least=least)
    return Gate(
        name=name, what=what, state=state, value=found.value, low=found.low, high=found.high,
        margin=margin, least=least,
        needed=_needed(found, margin) if state == "inconclusive" else None,
    )  # fmt: skip


def _needed(found: Aggregate, margin: float) -> int | None:
    """Images that would decide if the value stays: the interval shrinks with the root of N."""
    apart = abs(found.value - margin)
    half = max(found.high - found.value, found.value - found.low)
    return math.ceil(found.n * (half / apart) ** 2) if apart > 1e-6 else None


def _sentence(
    step: Step, reference: str, other: Comparison, state: State, gates: Sequence[Gate]
) -> str:
    """For one who reads nothing else."""
    n = len(other.images)
    decided = [g for g in gates if g.state == state]
    if state == "pass":
        if step == "distillation":
            alike = ""
            if lost := other.aggregate.get("shared_lost"):
                kept, chance = (round(n * (1 - x)) for x in (lost.value, 0.95))
                alike = (
                    f"Shown the same parts of an image, {other.name} weighs them as {reference} "
                    f"does: in {kept} of {n} images (by chance {chance}) the two maps agree better "
                    "than 95 % of maps of other patients with the same answer do. "
                )
            return alike + (
                f"On {n} images {other.name} explains itself faithfully, and looks at the masked "
                f"regions and at markers no worse than {reference} within the declared margins."
                if "energy" in other.paired
                else f"On {n} images {other.name} explains itself faithfully and answers to "
                f"markers no more than {reference} within the declared margins."
            )
        kept = round(n * (1 - other.aggregate["lost"].value)) if "lost" in other.aggregate else n
        return (
            f"In {kept} of {n} images the map of {other.name} agrees with {reference}'s of the "
            "same image better than 95 % of maps of other patients with the same answer do."
        )
    found = [
        f"{g.name.partition(' of ')[2] or other.name} looks elsewhere: {g.what}: {_found(g)}."
        for g in gates
        if g.state == "fail" and _of_looks(g)
    ]
    decided = [g for g in decided if state != "fail" or not _of_looks(g)]
    told = "; ".join(f"{g.what}: {_found(g)}" for g in decided[:3])
    more = f" and {len(decided) - 3} more" if len(decided) > 3 else ""
    if state == "invalid":
        found.insert(0, f"Maps cannot be used to judge {other.name}: {told}{more}.")
    elif state == "fail" and decided:
        found.append(f"{other.name} does not keep what {reference} has: {told}{more}.")
    if found:
        return " ".join(found)
    most = max((g.needed or 0 for g in decided), default=0)
    wanted = f" About {most} images would decide." if most else ""
    return f"{n} images do not decide about {other.name}: {told}{more}.{wanted}"


def _found(g: Gate) -> str:
    side = "at least" if g.least else "at most"
    return f"{g.value:.2f} [{g.low:.2f}, {g.high:.2f}], {side} {g.margin:.3g} asked"
