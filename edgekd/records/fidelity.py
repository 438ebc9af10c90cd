"""Whether explanations survive compression: figures image by image, and the verdict."""

from __future__ import annotations

from typing import ClassVar

from edgekd.records.margins import Margins, State, Verdict
from edgekd.records.store import Record, Stored
from edgekd.records.timing import Machine


class Agreement(Record):
    """One image: how alike are the reference's and the artifact's maps of one class?"""

    image: str  # start of the hash of its file
    label: str
    explained: str  # the class explained: the reference's answer
    answer: str  # the artifact's answer
    probability: float  # that it gives this answer, calibrated
    figures: dict[str, float | None]  # pearson, spearman, iou20, ... None: undefined
    null: dict[str, float | None]  # the same against another image's map


class Aggregate(Record):
    """A figure's mean over images with its interval, beside the same figure of strangers' maps."""

    value: float
    low: float
    high: float
    null: float | None = None
    n: int


class Swayed(Record):
    """One image that a marker moved the answer to."""

    image: str  # start of the hash of its file
    model: str
    marker: str  # its name in shortcuts.markers
    before: tuple[str, float]  # answer, and its calibrated probability
    after: tuple[str, float]  # with the marker
    moved: float  # total variation, less what the flat patch in its place does


class Survived(Record):
    """One image whose answer survives although the organ (or the lesion) is hidden."""

    image: str  # start of the hash of its file
    model: str
    region: str  # what was hidden: "organ" or "lesion"
    answer: str
    before: float  # calibrated probability of the answer on the whole image
    after: float  # and with the region hidden


class Comparison(Record):
    """One artifact's explanations beside those of what it was compressed from."""

    name: str
    reference: str = ""  # name of what it is compared with; empty: the first, that is itself
    artifact_sha256: str
    precision: str
    runtime: str
    layer: str
    seconds_per_map: float
    asked_per_map: float | None = None  # masked images a map
    undefined: int  # maps that are flat: nothing to say
    remark: str = ""  # of the runtime, to be told beside the figures
    aggregate: dict[str, Aggregate]  # agreement with the reference; localisation of its own maps
    checks: dict[str, Aggregate] = {}  # of this model alone: examine.CHECKS, occlusion.CHECKS
    parts: dict[str, dict[str, Aggregate]] = {}  # "class x", "subgroup y"; empty: too few patients
    limit: float | None = None  # Pearson that 95 % of strangers' maps stay under
    region: str = ""  # hidden in checks: "organ", "lesion", "organ or lesion"; empty: no masks
    paired: dict[str, Aggregate] = {}  # this less the reference, image by image
    verdict: Verdict | None = None  # None: the first, which nothing was compressed to
    images: tuple[Agreement, ...]


class Fidelity(Stored):
    """Do the explanations survive compression? Each step judged by the profile's margins."""

    FILE: ClassVar[str] = "fidelity.json"
    reference: str
    reference_sha256: str
    variant: str
    grid: int  # maps are compared after area-averaging to grid x grid
    data_fingerprint: str
    split: str
    comparisons: tuple[Comparison, ...]  # in the order of compression; the first is whole
    verdict: State | None = None  # the worst of the steps'; None: nothing was compressed
    reasons: tuple[str, ...] = ()  # a sentence a step
    margins: Margins = Margins()
    margins_sha256: str = ""
    fast: float = 1.0  # share of channels asked of the teacher; 1: all, its maps are exact
    fast_r: float = 1.0  # lowest correlation of a fast map with the exact one, where certified
    published: dict[str, Aggregate] = {}  # file -> agreement of published maps with a random head's
    swayed: tuple[Swayed, ...] = ()  # the images that markers moved most, of the last file
    hidden: dict[str, int] = {}  # "organ", "lesion": images of which it was hidden
    survived: tuple[Survived, ...] = ()  # the surest answers without it, some of each file
    mask_share: float | None = None  # mean area of the masks, share of the image
    machine: Machine
    versions: dict[str, str] = {}
    seed: int = 0
