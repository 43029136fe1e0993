"""The page of one or several studies: what was asked, what was found, how it was made.

Every sentence with a number in it is computed from the records; nothing here was typed in by hand.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from terdit_cli import console
from terdit_cli.lab.study.collect import Findings, Model, guidance, pair_named, steps_named
from terdit_cli.lab.study.drawings import bars, curves, loss_against_distance, sizes, trits
from terdit_cli.lab.study.score_tables import (
    class_table,
    cost_of,
    cost_table,
    latency_table,
    loss_table,
    main_table,
    nearest_table,
)
from terdit_cli.lab.study.spec import AFTER, Pair, Study, words_of
from terdit_cli.report.blocks import (
    Block,
    Card,
    Cards,
    Commands,
    Heading,
    Notes,
    Picture,
    Pictures,
    Plots,
    Table,
    Text,
    without_pictures,
    write_html,
    write_markdown,
)
from terdit_cli.report.figures import number
from terdit_cli.system.atomic import remove_file

ENOUGH_IMAGES = 10_000  # for a distance that others can compare with
_MOST_COLUMNS = 16  # classes in a picture
_PAIRS = 2  # generated images of each class that are shown with their nearest
TITLE = "terdit: ternary against full precision"


def write_pages(path: Path, studies: Sequence[Findings]) -> None:
    """Write PATH.md with its folder of pictures, PATH-tables.md and, of both, PATH.html.

    Raises:
        EnvironmentProblem: a file cannot be written.
    """
    tables = path.with_name(f"{path.stem}-tables.md")
    first: list[Block] = [
        Heading(1, TITLE),
        Text(
            "What does a diffusion transformer lose when its large matrices are ternary? All "
            "models of a study see the same images in the same order with the same noise (a "
            "second training sees those of the first again); they differ in what their line of "
            "the table of variants says, and in nothing else. A distance is lower for images that "
            "are more like the real ones."
        ),
    ]
    whole = list(first)
    where = f"All tables, variants and commands: [{tables.name}]({tables.name})."
    short: list[Block] = [*first, Text(where)]
    rest: list[Block] = [Heading(1, f"{TITLE}: all tables")]
    for findings in studies:
        headline, more = list(_headline(findings)), list(_details(findings))
        short += headline
        rest += [Heading(2, findings.study.title), *more]
        whole += [*headline, *more]
    folder = path.with_suffix("")
    used = write_markdown(path, short, folder)
    write_markdown(tables, without_pictures(rest), folder)
    write_html(path.with_suffix(".html"), TITLE, whole)
    studies_shown = {findings.study.name for findings in studies}
    for old in folder.glob("*--*"):  # of variants that a study no longer has
        if old.name not in used and old.name.partition("--")[0] in studies_shown:
            remove_file(old)


def _headline(findings: Findings) -> Iterator[Block]:
    """Yield what was asked and found: setting, ratios, one table, curves, images."""
    study = findings.study
    yield Heading(2, study.title)
    yield Text(_setting(findings))
    if notes := list(_notes(findings)):
        yield Notes(notes)
    if cards := list(_cards(findings)):
        yield Cards(cards)
    if not any(model.scores for model in findings.models):
        yield Text("Nothing is scored yet.")
        return
    yield Heading(3, "At the last step")
    yield Text(
        'Means over the seeds (and their range). "ratio" is the ratio to '
        f"{_label(findings, study.headline.baseline)} of the same seed; "
        '"classifier accuracy": generated images that a linear probe on the same features takes '
        'for their class; "memorisation rate": images closer to a training image than 99 % of the '
        "training images are to each other, as about 1 % of new images would be. Steps of A + B: "
        "initialised from a model that had taken A."
    )
    yield main_table(findings, study.largest_scale)
    yield Heading(3, "Over training")
    yield Text(
        "Steps are those in all: a model that is initialised from another goes on where that one "
        "ended. Lines join the means over seeds (before the last step: the first seed), or "
        "finished trainings of different length; dots are the seeds."
    )
    yield Plots(curves(findings))
    yield from _pictures(findings, study.largest_scale)


def _details(findings: Findings) -> Iterator[Block]:
    """Yield all else: the other tables, their figures, the variants and every command."""
    study = findings.study
    if not any(model.scores for model in findings.models):
        return
    *others, _ = sorted(study.evaluation.cfg_scales)
    if others or study.headline_images != study.evaluation.n:
        yield Heading(3, "At the last step, sampled otherwise")
    for scale in others:
        yield main_table(findings, scale)
    if study.headline_images != study.evaluation.n:
        yield Text(
            f"The {_pairs_named(study)} with {study.headline_images:,} images, each beside its own "
            "full-precision baseline:"
        )
        for scale in study.evaluation.cfg_scales:
            yield main_table(findings, scale, study.headline_images)
    for scale in others:
        yield from _pictures(findings, scale)
    if figures := bars(findings):
        yield Heading(3, "Side by side")
        yield Plots(figures)
    yield Heading(3, "Loss against distance")
    yield Text(_what_losses(findings))
    yield Plots(loss_against_distance(findings))
    yield loss_table(findings)
    if figures := trits(findings):
        yield Heading(3, "The trits during training")
        yield Plots(figures)
    yield Heading(3, "What it costs")
    yield Text(
        "Bytes are those of the whole model: a .tdt with all but the ternary matrices in bfloat16 "
        "(t2: 2 bits per ternary weight, t5: 1.6), or all weights in bfloat16. Memory is the peak "
        "of the process that samples. Latency is of one image at a time, median and range of its "
        "repeats (where a model's own is not known, of a network that differs in weights alone), "
        'in the form and precision that "runs as" names; distances are of models that compute in '
        "float32, unless a variant says otherwise." + _scatter(findings)
    )
    yield cost_table(findings)
    yield latency_table(findings)
    if figures := sizes(findings):
        yield Plots(figures)
    yield from class_table(findings)
    yield from nearest_table(findings)
    yield from _nearest_pictures(findings)
    yield Heading(3, "The variants and their questions")
    yield Table(
        ("variant", "question", "what differs", "seeds", "steps"),
        [
            (
                variant.label,
                variant.question,
                _what_differs(findings, variant.name),
                ", ".join(map(str, study.seeds_of(variant))),
                steps_named(study, variant),
            )
            for variant in study.variants
        ],
    )
    yield _commands(findings)


def _scatter(findings: Findings) -> str:
    """Return how much the latency of one and the same network differs between variants."""
    alike: dict[tuple[object, ...], list[float]] = {}
    for model in findings.models:
        if (cost := model.footprint) is not None and cost.latency:
            alike.setdefault((cost.machine, *cost.kind), []).append(median(cost.latency))
    most = max(alike.values(), key=lambda found: max(found) / min(found), default=[])
    if len(most) < 2:
        return ""
    low, high = (f"{1000 * seconds:.3g}" for seconds in (min(most), max(most)))
    return (
        f" They were measured at different hours on a shared machine: networks of one size, run "
        f"alike, took from {low} to {high} ms. What is less than that is the machine's."
    )


def _label(findings: Findings, name: str) -> str:
    return findings.study.variant(name).label


def _pairs_named(study: Study) -> str:
    return "pairs" if study.also else "headline's pair"


def _setting(findings: Findings) -> str:
    """Return how everything was scored, in a few sentences."""
    study, evaluation = findings.study, findings.study.evaluation
    scores = [score for model in findings.models for score in model.scores.values()]
    reference = evaluation.reference
    if reference == "train":
        reference = "the training images"
    if scores:
        reference += f" ({scores[0].evaluation.get('n_reference') or 0:,} images)"
        pipeline = scores[0].evaluation.get("pipeline", evaluation.features)
    else:
        pipeline = evaluation.features
    others = []
    if evaluation.curve_images != evaluation.n:
        others.append(f"{evaluation.curve_images:,} for the curves")
    if study.headline_images != evaluation.n:
        others.append(f"{study.headline_images:,} for the {_pairs_named(study)}")
    curve = f" ({', '.join(others)})" if others else ""
    words = ", ".join([*study.overrides, *study.words])
    return (
        f"Recipe {study.recipe.name}{f' with {words}' if words else ''}; "
        f"seeds {', '.join(map(str, study.seeds))}. "
        f"{evaluation.n:,} images per model{curve} from its averaged weights, {evaluation.sampler} "
        f"with {evaluation.sampling_steps} steps, seed {evaluation.seed}, classes in turn, "
        f"compared with {reference} by {pipeline}."
    )


def _notes(findings: Findings) -> Iterator[str]:
    study = findings.study
    if findings.missing:
        yield f"{findings.missing} scores are missing: the study is not finished."
    if study.evaluation.n < ENOUGH_IMAGES:
        yield (
            f"{study.evaluation.n:,} images are few: distances of so many are biased upwards and "
            "compare only with each other."
        )
    seeds = Counter(model.variant.name for model in findings.models if model.scores)
    if alone := sum(count == 1 for count in seeds.values()):
        of = "" if alone == len(seeds) else f" of {alone} of {len(seeds)} variants"
        yield f"One seed{of}: no spread is known, and small differences mean nothing."
    for model in findings.models:
        name = f"{model.variant.label}, seed {model.seed}"
        if model.training is not None and model.training.failed:
            yield f"{name}: {model.training.failed}."
        if model.changed:
            changed = ", ".join(model.changed)
            yield f"{name} was made with other settings than the study now has: {changed}."


def _cards(findings: Findings) -> Iterator[Card]:
    study = findings.study
    headline = study.headline
    for pair in study.pairs:
        for scale in study.evaluation.cfg_scales:
            yield from _ratio_card(findings, pair, scale, study.headline_images)
        if pair.again is not None:
            for scale in study.evaluation.cfg_scales:
                yield from _ratio_card(findings, pair, scale, study.evaluation.n, again=True)
    found = [cost_of(findings, name) for name in (headline.ternary, headline.baseline)]
    costs = [model.footprint.bytes for model in found if model is not None and model.footprint]
    if len(costs) == 2:
        small, large = map(console.byte_size, costs)
        words = f"{large} in bfloat16, {small} as .tdt"
        yield Card("bytes on disk, baseline : ternary", f"{costs[1] / costs[0]:.1f}", words)


def _ratio_card(
    findings: Findings, pair: Pair, scale: float, n: int, again: bool = False
) -> Iterator[Card]:
    """Yield a pair's ratio, or that to full precision which trained as long, if it is there."""
    study, ternary = findings.study, pair.ternary
    other = pair.again if again and pair.again else pair.baseline
    goal = None if again else pair.goal
    ratio = findings.ratio(ternary, scale, n, other)
    distances = [findings.distance(name, scale, n) for name in (ternary, other)]
    if ratio is None:
        return
    means = (number(fmean(d.values[seed] for seed in ratio.values)) for d in distances if d)
    seeds = f"; {len(ratio.values)} seeds" + (f", {ratio.spread}" if ratio.spread else "")
    variants = [study.variant(name) for name in (ternary, other)]
    steps = " : ".join(steps_named(study, variant) for variant in variants)
    equal = len({sum(study.steps_taken(variant)) for variant in variants}) == 1
    yield Card(
        f"{pair_named(study, pair, again)}, {guidance(scale)}",
        f"{ratio.mean:.3f}",
        f"{findings.distance_name} of {n:,} images {' : '.join(means)}"
        f"{seeds if len(ratio.values) > 1 else '; one seed'}; steps {steps}"
        + (f"; goal at most {goal:g}" if goal else "")
        + ("" if goal is None or equal else f", {findings.verdict_of(ratio, pair)}"),
        ratio.mean <= goal if goal and equal else None,
    )


def _pictures(findings: Findings, scale: float) -> Iterator[Block]:
    shown = []
    for name in findings.study.shown:
        model = next((m for m in findings.models_of(name) if scale in m.grids), None)
        if model is not None:
            shown.append(_class_columns(model.variant.label, model.grids[scale]))
    if shown:
        classes = ", ".join(findings.class_names[: shown[0].columns])
        yield Heading(3, f"Images from the same noise, {guidance(scale)}")
        yield Pictures(
            f"{findings.study.name}--images-cfg-{scale:g}",
            "The same place in each picture began as the same noise (seed "
            f"{findings.study.evaluation.seed}, uncurated). From left to right: {classes}.",
            shown,
        )


def _nearest_pictures(findings: Findings) -> Iterator[Block]:
    """Yield rows of generated images, each above the training images that are nearest to them."""
    study = findings.study
    scale = study.largest_scale
    shown, said = [], []
    for name in study.paired:
        found = (m for m in findings.models_of(name) if m.nearest is not None and scale in m.grids)
        model = next(found, None)
        if model is None or model.nearest is None or model.neighbours is None:
            continue
        pairs = np.stack([model.grids[scale], model.nearest], axis=2)[:, :_PAIRS]
        label, near = model.variant.label, model.neighbours
        shown.append(_class_columns(label, pairs.reshape(len(pairs), -1, *pairs.shape[3:])))
        unseen = near.held_out
        said.append(
            f"{label}: median {median(near.distances):.1f}, least {min(near.distances):.1f}"
            + (f" (held-out images: {median(unseen):.1f}, {min(unseen):.1f})" if unseen else "")
            + f", {len(near.distances)} images among {near.searched:,}"
        )
    if shown:
        yield Text(
            "The nearest of all training images (and their mirror images, where a recipe mirrors), "
            "pixel by pixel. Root mean square of the differences, in levels of 0 to 255: "
            f"{'; '.join(said)}."
        )
        words = "Below each row of generated images: their nearest training images."
        yield Pictures(f"{study.name}--nearest", words, shown)


def _class_columns(label: str, images: NDArray[np.uint8]) -> Picture:
    """Return images [C, K, H, W, 3] as a picture with a column for each class."""
    shown = images[:_MOST_COLUMNS]
    return Picture(label, shown.swapaxes(0, 1).reshape(-1, *shown.shape[2:]), len(shown))


def _what_losses(findings: Findings) -> str:
    losses = [loss for model in findings.models for loss in model.losses.values()]
    images = losses[0].images if losses else "images"
    return (
        f"Losses are of the averaged weights on {images}, with timesteps and noise that are the "
        "same for every model. Quarter 1 of the timesteps has the least noise."
    )


def _what_differs(findings: Findings, name: str) -> str:
    variant = findings.study.variant(name)
    if variant.of is None:
        words = list(variant.overrides)
        if variant.after is not None:
            after = f"ckpt.pt of {_label(findings, variant.after)}"
            words = [word.replace(AFTER, after) for word in words]
    else:
        words = [_label(findings, variant.of)]
    if variant.ternarize is not None:
        words.append(f"PTQ, scales per {variant.ternarize}")
    if (pack := variant.pack) is not None:
        words.append(f"packed {pack.codec}, rest {pack.rest}, activations {pack.activations}")
    if variant.eps_scale != 1:
        words.append(f"sampled with the predicted noise times {variant.eps_scale:g}")
    return ", ".join(words) or "nothing"


def _training_command(study: Study, model: Model) -> str:
    """Return the command that trains a model as it was trained, with the recipe of today.

    The recorded one leaves out what the recipe said on that day.
    """
    assert model.training is not None
    recorded = shlex.split(model.training.command)
    if model.changed:
        return model.training.command
    after = None
    if model.variant.after is not None:
        # The checkpoint that stands for $after, in whichever option.
        key = next(w.partition("=")[0] for w in model.variant.overrides if AFTER in w)
        after = next((w.partition("=")[2] for w in recorded if w.startswith(f"{key}=")), None)
    words = words_of(study, model.variant, model.seed, Path(after) if after else None)
    return shlex.join(["terdit", "train", str(study.recipe), *words])


def _commands(findings: Findings) -> Commands:
    """Return every command with its machine and date, for a third person to repeat."""
    study = findings.study
    rows = []
    if (probe := findings.probe) is not None:
        rows.append(("training images: reference", probe.command, f"{probe.machine}; {probe.date}"))
    for model in findings.models:
        name = f"{model.variant.label}, seed {model.seed}"
        if model.training is not None:
            training = model.training
            where = f"{training.machine}; {training.date}; {console.duration(training.seconds)}"
            rows.append((f"{name}: training", _training_command(study, model), where))
        if model.conversion is not None:
            made = model.conversion
            rows.append((f"{name}: made of it", made.command, f"{made.machine}; {made.date}"))
        for (step, scale, n), score in sorted(model.scores.items()):
            what = f"{name}: step {step:,}, {guidance(scale)}, {n:,} images"
            rows.append((what, score.command, f"{score.machine}; {score.date}"))
        if model.footprint is not None:
            cost = model.footprint
            rows.append((f"{name}: latency", cost.command, f"{cost.machine}; {cost.date}"))
    return Commands(f"Every command of this study ({study.command})", rows)
