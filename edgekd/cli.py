"""The command line: read options, call one stage, show the result. Nothing heavy at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd import __version__, cli_bench, cli_deploy, cli_device, cli_files
from edgekd.cli_aside import data_app, profiles_app
from edgekd.cli_bundle import bundle_app
from edgekd.options import (
    RUNS,
    AlphaOption,
    BatchOption,
    DataOption,
    EpochsOption,
    EstimateOption,
    ForceOption,
    GiveUpOption,
    Group,
    JsonOption,
    LayerOption,
    LeakageOption,
    LrOption,
    NoTeacherOption,
    PretrainedOption,
    ProfileOption,
    ProfilesOption,
    ResizeOption,
    RunOption,
    RunsOption,
    ScheduleOption,
    SeedOption,
    SensitivityOption,
    SetOption,
    SizeOption,
    SplitOption,
    StartOption,
    StartPretrainedOption,
    StartWeightsOption,
    StudentOption,
    SubnetsOption,
    SupernetOption,
    TeacherEpochsOption,
    TeachersOption,
    TeacherWeightsOption,
    TemperatureOption,
    place,
    result,
    training_of,
    trains,
)
from edgekd.records import Arch, Artifact, EdgeKDError, Profile

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(profiles_app, name="profiles")
app.add_typer(data_app, name="data")
app.add_typer(bundle_app, name="bundle")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"edgekd {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Distil, quantise, measure and explain image classifiers for bedside devices.

    The line: distill, quantize, export, bench, explain, report. Each goes on from the one before.
    """


@app.command()
def teach(
    model: Annotated[str, typer.Argument(help="timm name, e.g. resnet18")] = "resnet18",
    data_folder: DataOption = None,
    split: SplitOption = None,
    allow_leakage: LeakageOption = False,
    size: SizeOption = 128,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Local checkpoint (.safetensors, .pth).")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Weights from the hub (needs a network).")
    ] = False,
    epochs: EpochsOption = None,
    lr: LrOption = None,
    batch: BatchOption = None,
    settings: SetOption = None,
    sensitivity: SensitivityOption = None,
    resize: ResizeOption = "stretch",
    seed: SeedOption = 0,
    runs_folder: RunsOption = RUNS,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a teacher: any timm network, from a checkpoint, the hub or from scratch.

    Example: edgekd teach tf_efficientnet_lite0 --weights lite0.pth --data scans --epochs 8
    """
    trains()
    from edgekd import show, workplace

    training = training_of(settings, epochs=epochs, lr=lr, batch=batch)
    with show.tracker() as track:
        work = workplace.Workplace.open(
            runs_folder, data_folder, size or 128, resize, seed, track,
            split=split, allow_leakage=allow_leakage,
        )  # fmt: skip
        artifact = workplace.teach(
            work, model, training, weights=weights, pretrained=pretrained,
            sensitivity=sensitivity, force=force,
        )  # fmt: skip
    result(as_json, artifact, show.artifact(artifact))


@app.command()
def shrink(
    profile: ProfilesOption = None,
    data_folder: DataOption = None,
    split: SplitOption = None,
    allow_leakage: LeakageOption = False,
    teacher: TeachersOption = None,
    teacher_weights: TeacherWeightsOption = None,
    pretrained: PretrainedOption = False,
    no_teacher: NoTeacherOption = False,
    teacher_epochs: TeacherEpochsOption = None,
    start: StartOption = "scratch",
    start_weights: StartWeightsOption = None,
    start_pretrained: StartPretrainedOption = False,
    schedule: ScheduleOption = "sandwich",
    size: SizeOption = None,
    epochs: EpochsOption = None,
    lr: LrOption = None,
    batch: BatchOption = None,
    alpha_hard: AlphaOption = None,
    temperature: TemperatureOption = None,
    settings: SetOption = None,
    resize: ResizeOption = "stretch",
    seed: SeedOption = 0,
    runs_folder: RunsOption = RUNS,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a supernet once, so that the student of every profile can be cut out of it.

    Example: edgekd shrink -p cpu -p jetson --data scans --start tf_efficientnet_lite0
    --start-weights lite0.pth
    """
    trains()
    from edgekd import show, workplace

    chosen = [Profile.read(name) for name in profile or ["cpu"]]
    given = {"epochs": epochs, "lr": lr, "batch": batch}
    soft = {"alpha_hard": alpha_hard, "temperature": temperature}
    training = training_of(settings, **given, **soft)
    with show.tracker() as track:
        pixels = size or max(p.pixels for p in chosen)
        work = workplace.Workplace.open(
            runs_folder, data_folder, pixels, resize, seed, track,
            split=split, allow_leakage=allow_leakage,
        )  # fmt: skip
        guides = [] if no_teacher else workplace.find_teachers(
            work, teacher, training_of(None, epochs=teacher_epochs),
            weights=teacher_weights, pretrained=pretrained,
        )  # fmt: skip
        for one in guides:
            show.say(f"teacher {one.model}, {one.folder}")
        artifact = workplace.shrink(
            work, chosen, guides, training,
            start=workplace.Start(start, start_weights, start_pretrained), schedule=schedule,
            force=force,
        )  # fmt: skip
    result(as_json, artifact, show.supernet(artifact))


@app.command()
def search(
    profile: ProfilesOption = None,
    data_folder: DataOption = None,
    split: SplitOption = None,
    allow_leakage: LeakageOption = False,
    supernet: SupernetOption = None,
    subnets: SubnetsOption = 60,
    generations: Annotated[
        int, typer.Option("--generations", min=1, help="At most, of 100 sub-nets each.")
    ] = 500,
    measure: Annotated[
        int, typer.Option("--measure", min=0, help="Sub-nets of the front to time for real.")
    ] = 6,
    estimate: EstimateOption = False,
    give_up: GiveUpOption = 0.0,
    prior: Annotated[
        Path | None,
        typer.Option("--prior", help="OFA's acc_predictor.pth: what it says is learnt from, too."),
    ] = None,
    size: SizeOption = None,
    resize: ResizeOption = "stretch",
    seed: SeedOption = 0,
    runs_folder: RunsOption = RUNS,
    run: RunOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the sub-nets of a supernet that fit a profile's budget: accuracy against latency.

    Example: edgekd search -p cpu -p jetson --data scans
    """
    trains()
    from edgekd import seek, show, workplace

    chosen = [Profile.read(name) for name in profile or ["cpu"]]
    if run is not None and len(chosen) > 1:
        raise EdgeKDError("--run is one run's folder: give one --profile, or leave it out")
    found = []
    with show.tracker() as track:
        pixels = size or max(p.pixels for p in chosen)
        work = workplace.Workplace.open(
            runs_folder, data_folder, pixels, resize, seed, track,
            split=split, allow_leakage=allow_leakage,
        )  # fmt: skip
        for one in chosen:
            base = workplace.find_supernet(work, one, supernet)
            if base is None:
                raise EdgeKDError(
                    f"no supernet of {one.space} for {work.folder} at {pixels} px in "
                    f"{runs_folder}: run edgekd shrink first"
                )
            front, sought = seek.search(
                work, one, base, run or runs_folder / one.name, subnets=subnets,
                generations=generations, estimate=estimate, measure=measure, prior=prior,
                slack=give_up / 100, force=force,
            )  # fmt: skip
            found.append((front, sought))
    tables = [{"front": f.model_dump(mode="json"), "sought": s.model_dump(mode="json")}
              for f, s in found]  # fmt: skip
    result(as_json, tables, show.searches(found))


@app.command()
def distill(
    profile: ProfileOption = None,
    data_folder: DataOption = None,
    split: SplitOption = None,
    allow_leakage: LeakageOption = False,
    teacher: TeachersOption = None,
    teacher_weights: TeacherWeightsOption = None,
    pretrained: PretrainedOption = False,
    no_teacher: NoTeacherOption = False,
    teacher_epochs: TeacherEpochsOption = None,
    student: StudentOption = None,
    supernet: SupernetOption = None,
    shrink_epochs: Annotated[
        int | None, typer.Option("--shrink-epochs", min=1, help="If it must be shrunk first.")
    ] = None,
    start: StartOption = "scratch",
    start_weights: StartWeightsOption = None,
    start_pretrained: StartPretrainedOption = False,
    subnets: SubnetsOption = 60,
    estimate: EstimateOption = False,
    give_up: GiveUpOption = 0.0,
    finalists: Annotated[
        int,
        typer.Option("--finalists", min=1, help="Sub-nets of the front to distil and compare."),
    ] = 1,
    size: SizeOption = None,
    epochs: EpochsOption = None,
    lr: LrOption = None,
    batch: BatchOption = None,
    alpha_hard: AlphaOption = None,
    temperature: TemperatureOption = None,
    settings: SetOption = None,
    sensitivity: SensitivityOption = None,
    layer: LayerOption = "",
    resize: ResizeOption = "stretch",
    seed: SeedOption = 0,
    runs_folder: RunsOption = RUNS,
    run: RunOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Distil a teacher into the profile's student, cut out of a supernet for its budget.

    What is missing is made first: teacher, supernet, search. --student trains one sub-net alone.
    With --finalists 3, three of the front are distilled, from the fastest to the most accurate, and
    the fastest is kept that gives up at most --give-up points as distilled, on validation.
    Examples: edgekd distill --profile jetson
    · edgekd distill -p cpu --data scans --teacher tf_efficientnet_lite0 --teacher-weights w.pth
    """
    trains()
    from edgekd import finals, seek, show, workplace

    chosen = Profile.read(profile or "cpu")
    given = {"epochs": epochs, "lr": lr, "batch": batch}
    soft = {"alpha_hard": alpha_hard, "temperature": temperature}
    training = training_of(settings, **given, **soft)
    with show.tracker() as track:
        folder, pixels = run or runs_folder / chosen.name, size or chosen.pixels
        workplace.check(chosen, student, folder)
        if finalists > 1 and (named := student or chosen.student):
            raise EdgeKDError(
                f"--finalists are of a search, student {named} is none: leave one out"
            )
        work = workplace.Workplace.open(
            runs_folder, data_folder, pixels, resize, seed, track,
            split=split, allow_leakage=allow_leakage,
        )  # fmt: skip
        show.say(f"run {folder}: {work.folder}, {pixels} pixels")
        guides = [] if no_teacher else workplace.find_teachers(
            work, teacher, training_of(None, epochs=teacher_epochs),
            weights=teacher_weights, pretrained=pretrained,
        )  # fmt: skip
        for one in guides:
            show.say(f"teacher {one.model}, {one.folder}")

        def made(pupil: workplace.Pupil, where: Path, anew: bool) -> Artifact:
            return workplace.distill(work, chosen, where, guides, training, pupil,
                                     sensitivity=sensitivity, layer=layer, force=anew)  # fmt: skip

        begin = workplace.Start(start, start_weights, start_pretrained)
        if student or chosen.student:
            pupil = workplace.pupil(work, student or chosen.student, begin)
        else:
            base = workplace.find_supernet(work, chosen, supernet) or workplace.shrink(
                work, [chosen], guides, training_of(None, epochs=shrink_epochs),
                start=begin, schedule="sandwich",
            )  # fmt: skip
            show.say(f"supernet {base.model}, {base.folder}")
            slack = give_up / 100
            front, sought = seek.search(
                work, chosen, base, folder, subnets=subnets, estimate=estimate,
                slack=slack if finalists == 1 else 0.0,
            )  # fmt: skip
            if not seek.told_apart(sought):
                show.say("all sub-nets are equally accurate: chosen for speed alone")
            if finalists > 1:

                def one_of_them(name: str, arch: Arch, where: Path) -> Artifact:
                    return made(workplace.Pupil(name, arch, base), where, force)

                sought, compared = finals.settle(
                    front, sought, folder, one_of_them, count=finalists, slack=slack, force=force
                )
                for each in compared.finalists:
                    show.say(f"finalist {each.name}: predicted {each.p50_ms:.3g} ms, distilled "
                             f"{each.accuracy:.3f} balanced accuracy on validation")  # fmt: skip
                force = False  # the student that is there is the chosen one's
            show.say(f"student {sought.chosen}")
            arch = seek.chosen_of(front, sought).arch
            pupil = workplace.Pupil(sought.chosen, arch, base)
        artifact = made(pupil, folder, force)
    result(as_json, artifact, show.artifact(artifact, *guides[:1]))


for command in (
    cli_files.quantize, cli_files.export, cli_files.verify, cli_files.doctor, cli_bench.bench,
    cli_deploy.deploy, cli_device.predict, cli_device.serve,
):  # fmt: skip
    app.command()(command)


@app.command()
def explain(
    profile: ProfileOption = None,
    images: Annotated[
        int | None,
        typer.Option("--images", min=4, help="Test images, by class. [default: the profile's]"),
    ] = None,
    variant: Annotated[
        str, typer.Option("--variant", help="evidence, published, grad-cam or torchcam.")
    ] = "evidence",
    fast: Annotated[
        bool,
        typer.Option("--fast", help="The teacher's maps from fewer channels, if as good."),
    ] = False,
    layers: Annotated[
        int,
        typer.Option("--layers", min=0, help="Images shown layer by layer in the report."),
    ] = 0,
    runs_folder: RunsOption = RUNS,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score-CAM on the deployed file in its own runtime: do the explanations survive?

    Judged by the margins that the profile declares. Exit 3: they do not, or cannot be judged by
    maps at all; 6: too few images to say. Example: edgekd explain --images 200
    """
    from edgekd import evidence, show

    with show.tracker() as track:
        here = place(runs_folder, run, profile, track)
        found = evidence.judge(here, images=images, variant=variant, fast=fast, depths=layers)
    result(as_json, found, show.fidelity(found))
    if code := evidence.CODES[found.verdict]:
        raise typer.Exit(code)


@app.command()
def report(
    profile: ProfileOption = None,
    cases: Annotated[int, typer.Option("--cases", min=1, help="Images in the gallery.")] = 12,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Leave every picture out; the numbers stay.")
    ] = False,
    runs_folder: RunsOption = RUNS,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """One self-contained HTML page: verdict, models, timing, explanations. And report.json."""
    from edgekd import show, stages

    with show.tracker() as track:
        here = place(runs_folder, run, profile, track)
        page = stages.report(here, cases=cases, pictures=not no_images)
    result(as_json, {"report": str(page)}, str(page))


@app.command("run")
def run_recipe(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a .toml file.")],
    data_folder: DataOption = None,
    runs_folder: Annotated[
        Path | None, typer.Option("--runs", help="[default: runs/RECIPE]")
    ] = None,
    show_only: Annotated[
        bool, typer.Option("--show", help="Print the recipe, run nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a study from beginning to end; stopped, the same command goes on.

    Example: edgekd run paper1-brain --data scans · edgekd run paper2-covid --show
    """
    from edgekd import show
    from edgekd.recipes import Recipe

    made = Recipe.read(recipe)
    if show_only:
        result(as_json, made, show.recipe(made))
        return
    if data_folder is None:
        raise EdgeKDError(f"{made.name} needs --data: {made.data}")
    command = typer.main.get_command(app)

    def call(words: list[str]) -> int:
        return command.main(words, standalone_mode=False) or 0

    root = runs_folder or RUNS / made.name
    told, code = made.play(data_folder, root, call, show.say, as_json=as_json)
    result(as_json, told, f"finished, see {root}")
    if code:
        raise typer.Exit(code)


def main() -> None:
    """Entry point of the `edgekd` script."""
    app()
