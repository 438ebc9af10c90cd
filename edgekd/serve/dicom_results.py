"""An answer as DICOM: a Secondary Capture with the map, and a Structured Report (TID 1500).

Patient and study are copied from the image that was sent, as results must be filed there; they go
into these objects and nowhere else. UIDs are SHA-256 sums under 2.25 (PS3.5, B.2): the same image,
model, bundle, threshold and version give the same, so an archive keeps one copy of what is sent
again.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import highdicom
import pydicom
from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sc import SCImage
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from edgekd import __version__
from edgekd.data import dicom
from edgekd.explain import score_cam
from edgekd.records import EdgeKDError
from edgekd.serve.inference_queue import Told
from edgekd.serve.model import Model

UTF_8 = "ISO_IR 192"  # character set of results, whatever the image's was
MAKER = "EdgeKD"
SCHEME = "99EDGEKD"  # of codes that no standard has
NOT_FOR_DIAGNOSIS = "Research use, not for diagnosis."
_UID = re.compile(r"[0-9.]{1,64}")
_KEYS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
# Patient and Study modules: what they must have, empty where the image has none, and what they may
_MUST = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
         "StudyID", "AccessionNumber", "ReferringPhysicianName")  # fmt: skip
_MAY = ("IssuerOfPatientID", "StudyDescription")
# What is as true of the picture of a map as of the image
_OF_IMAGE = ("Laterality", "ImageLaterality", "BodyPartExamined", "BurnedInAnnotation",
             "LossyImageCompression", "LossyImageCompressionRatio",
             "LossyImageCompressionMethod")  # fmt: skip
_COMMENT = Code("121106", "DCM", "Comment")
_IMAGING = Code("363679005", "SCT", "Imaging")


class Unfit(EdgeKDError):
    """An image whose results could be filed nowhere."""


class Source(NamedTuple):
    """Whose image it is, and where its results belong."""

    keys: dict[str, str]  # keyword -> UID, of _KEYS
    said: dict[str, Any]  # keyword -> text or numbers, of the rest; empty elements are left out


@functools.cache
def silence() -> None:
    """The packages are told not to speak: what they say quotes a patient's values."""
    for name in ("pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    settings = pydicom.config.settings
    settings.reading_validation_mode = settings.writing_validation_mode = pydicom.config.IGNORE


def quieten() -> None:
    """No warnings of those packages, in any thread, nor of what calls them here."""
    warnings.filterwarnings("ignore", module=r"pydicom|highdicom|pynetdicom|edgekd\.d(icom|evice)")


def source(data: bytes) -> Source:
    """What a DICOM file says of whose it is; Unfit if results could not be filed beside it.

    EdgeKDError if it cannot be read. No message has a value of the file in it.
    """
    found = dicom.elements(data, (*_KEYS, *_MUST, *_MAY, *_OF_IMAGE, "PatientOrientation"))
    keys = {k: found.get(k, "") for k in _KEYS}
    if missing := [k for k, v in keys.items() if not isinstance(v, str) or not _UID.fullmatch(v)]:
        raise Unfit(f"DICOM without a valid {', '.join(missing)}: export it again")
    said = {k: found[k] for k in (*_MUST, *_MAY, *_OF_IMAGE, "PatientOrientation") if found.get(k)}
    return Source({k: str(v) for k, v in keys.items()}, said)


def made(of: Source, told: Told, model: Model) -> list[Dataset]:
    """The Structured Report, and the Secondary Capture where there is a map."""
    results: list[Dataset] = [_report(of, told, model)]
    if told.heat is not None:
        results.insert(0, _capture(of, told, model))
    return results


def uid(*of: str) -> str:
    """2.25 and 128 bits of the SHA-256 of these words, as PS3.5, B.2 has it of a UUID."""
    found = hashlib.sha256("\0".join((MAKER, *of)).encode()).digest()
    return f"2.25.{int.from_bytes(found[:16], 'big')}"


def _by(model: Model) -> tuple[str, str, str]:
    """What an answer is of: the file, its bundle (temperature, verdict, words) and our version."""
    return model.artifact.sha256, model.bundle, __version__


def _common(kind: str, of: Source, told: Told, model: Model, title: str) -> dict[str, Any]:
    """What every result says of its series, its instance and its maker."""
    study, by = of.keys["StudyInstanceUID"], _by(model)
    return {
        "series_instance_uid": uid(kind, "series", study, *by),
        "sop_instance_uid": uid(
            kind, "instance", told.answer.image, *by, repr(model.abstain_below)
        ),
        "series_number": 9901 if kind == "map" else 9902, "instance_number": 1,
        "series_description": f"{MAKER} {title}, not for diagnosis", "manufacturer": MAKER,
        "manufacturer_model_name": model.manifest.name[:64], "software_versions": __version__,
        "transfer_syntax_uid": ExplicitVRLittleEndian,
    }  # fmt: skip


def _file_under(of: Source, result: Dataset) -> None:
    """Put a result beside its image: the same patient, the same study."""
    result.SpecificCharacterSet = UTF_8
    for keyword in _MUST:
        setattr(result, keyword, of.said.get(keyword, ""))
    for keyword in _MAY:
        if keyword in of.said:
            setattr(result, keyword, of.said[keyword])


def _capture(of: Source, told: Told, model: Model) -> Dataset:
    """What the model saw, coloured where the map is high."""
    assert told.heat is not None
    image = SCImage(
        pixel_array=score_cam.overlay(told.seen.pixels, told.heat),
        photometric_interpretation="RGB", bits_allocated=8, coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # highdicom wants one: the image's own follows
        study_instance_uid=of.keys["StudyInstanceUID"],
        **_common("map", of, told, model, "Score-CAM"),
    )  # fmt: skip
    _file_under(of, image)
    image.PatientOrientation = of.said.get("PatientOrientation", "")
    for keyword in _OF_IMAGE:
        if keyword in of.said:
            setattr(image, keyword, of.said[keyword])
    image.ImageComments = f"{NOT_FOR_DIAGNOSIS} {_headline(told)}. Colours: Score-CAM of class " \
                          f"{told.explained}"  # fmt: skip
    image.DerivationDescription = (
        f"Scaled to {image.Columns} x {image.Rows} as the model takes it, and the Score-CAM map of "
        f"class {told.explained} blended in; model sha256 {model.artifact.sha256}, bundle "
        f"{model.bundle}; {MAKER} {__version__}"
    )[:1024]
    origin = Dataset()
    origin.ReferencedSOPClassUID = of.keys["SOPClassUID"]
    origin.ReferencedSOPInstanceUID = of.keys["SOPInstanceUID"]
    purpose = Code("121322", "DCM", "Source image for image processing operation")
    origin.PurposeOfReferenceCodeSequence = [sr.CodedConcept.from_code(purpose)]
    image.SourceImageSequence = [origin]
    return image


def _report(of: Source, told: Told, model: Model) -> Dataset:
    """The answer as a measurement report: a number a class, the rest as comments."""
    made, image, sha = model.manifest, told.answer.image, model.artifact.sha256
    origin = _as_evidence(of)
    observer = sr.ObserverContext(
        observer_type=sr.CodedConcept("121007", "DCM", "Device"),
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=highdicom.UID(uid("device", *_by(model))), name=made.name,
            manufacturer_name=MAKER, model_name=made.name,
        ),
    )  # fmt: skip
    algorithm = sr.AlgorithmIdentification(
        name=made.name, version=f"sha256 {sha}",
        parameters=[f"precision {made.precision}", f"runtime {made.profile.runtime}",
                    f"temperature {made.temperature:g}", f"bundle sha256 {model.bundle}",
                    f"{MAKER} {__version__}"],
    )  # fmt: skip
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=highdicom.UID(uid("tracking", image, *_by(model))), identifier=f"{MAKER} answer"
        ),
        algorithm_id=algorithm,
        measurements=[
            sr.Measurement(name=_probability_of(c), value=p, unit=Code("1", "UCUM", "no units"))
            for c, p in told.answer.probabilities.items()
        ],
        source_images=[
            sr.SourceImageForMeasurementGroup(
                origin.SOPClassUID, origin.SOPInstanceUID
            )
        ],
    )  # fmt: skip
    for words in _said(told, model):
        group[0].ContentSequence.append(
            sr.TextContentItem(name=_COMMENT, value=words, relationship_type="CONTAINS")
        )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=_IMAGING, imaging_measurements=[group],
    )  # fmt: skip
    codes = CodingSchemeIdentificationItem(designator=SCHEME, name=MAKER)
    report = sr.ComprehensiveSR(
        evidence=[origin], content=content, is_complete=True, coding_schemes=[codes],
        **_common("report", of, told, model, "answer"),
    )  # fmt: skip
    _file_under(of, report)
    return report


def _as_evidence(of: Source) -> Dataset:
    """The image as highdicom refers to it, nameless: a value that it does not like would raise."""
    origin = Dataset()
    for keyword, value in of.keys.items():
        setattr(origin, keyword, value)
    for keyword in _MUST:
        setattr(origin, keyword, None)
    return origin


def _probability_of(label: str) -> sr.CodedConcept:
    """A class's own code: the same in every model that has the class."""
    code = hashlib.sha256(label.encode()).hexdigest()[:12]
    return sr.CodedConcept(code, SCHEME, f"Probability of {label}"[:64])


def _headline(told: Told) -> str:
    answer = told.answer
    return f"No answer: {answer.abstained}" if answer.abstained else f"Answer: {answer.label}"


def _said(told: Told, model: Model) -> Iterator[str]:
    """What a reader must know besides the numbers."""
    made = model.manifest
    yield _headline(told)
    yield f"{NOT_FOR_DIAGNOSIS} Intended use: {made.intended_use}"
    yield from (f"Unusual of this image: {w}" for w in told.answer.warnings)
    drawn = "is in a Secondary Capture of this study" if told.heat is not None else "is undefined"
    yield f"Score-CAM map of class {told.explained} {drawn}"
    judged = f"explanations of this model: {made.verdict or 'not judged'}"
    yield f"Verdict on {judged}{'; used despite it: ' + made.despite if made.despite else ''}"
    yield f"SHA-256 of the image as a file: {told.answer.image}"
