"""The study file: what it resolves to, and every mistake by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.lab.study.spec import Study, checkpoint_words, load_study, recipe_of, words_of

SHIPPED = sorted((Path(__file__).parents[3] / "recipes" / "studies").glob("*.yaml"))


def test_variants_become_recipes_with_one_seed_and_one_name_each(study: Study) -> None:
    baseline, ternary = study.variant("baseline"), study.variant("ternary")
    recipe = recipe_of(study, baseline, 1)
    assert (recipe.seed, recipe.name, recipe.ternary.enabled) == (1, "small-baseline", False)
    other = recipe_of(study, ternary, 1)
    ours, theirs = (
        r.model_dump(exclude={"name": True, "ternary": {"enabled"}}) for r in (recipe, other)
    )
    assert ours == theirs


def test_overrides_of_the_command_line_come_after_the_study_and_before_the_variant(
    study_file: Path,
) -> None:
    study = load_study(study_file, ["optim.lr=1e-3", "ternary.enabled=true"])
    assert recipe_of(study, study.variant("ternary"), 0).optim.lr == 1e-3
    assert not recipe_of(study, study.variant("baseline"), 0).ternary.enabled


def test_which_models_are_scored_with_how_many_images(study: Study) -> None:
    ternary, derived = study.variant("ternary"), study.variant("ptq")
    assert study.steps_of(ternary) == (10, 20, 40)
    assert study.steps_of(derived) == (40,)
    assert [study.images_at(ternary, step) for step in (10, 40)] == [(20,), (20, 40)]
    assert study.images_at(derived, 40) == (40,)
    assert study.seeds_of(study.variant("no-norm")) == (0,)


def test_checkpoints_fall_on_every_scored_step(study: Study) -> None:
    ternary = study.variant("ternary")
    recipe = recipe_of(study, ternary, 0)
    assert checkpoint_words(study, ternary, recipe) == [
        "checkpoint.every=10", "checkpoint.keep_last=5"
    ]  # fmt: skip
    often = load_study(study.recipe.parent / "small.yaml", ["checkpoint.every=4"])
    recipe = recipe_of(often, ternary, 0)
    assert checkpoint_words(often, ternary, recipe)[0] == "checkpoint.every=2"


def test_what_a_variant_needs_comes_with_it(study: Study) -> None:
    assert [v.name for v in study.closure(["packed"])] == ["ternary", "packed"]
    with pytest.raises(UsageError, match=r"no such variant.*did you mean 'ternary'"):
        study.closure(["ternry"])


def test_a_variant_trained_after_another_gets_its_checkpoint(study_file: Path) -> None:
    warm = """\
  - {name: warm, label: from the baseline, question: "Does a start help?", after: baseline,
     overrides: [distill.teacher=$after]}
bars:"""
    study_file.write_text(study_file.read_text().replace("bars:", warm))
    study = load_study(study_file)
    words = words_of(study, study.variant("warm"), 0, Path("x/ckpt.pt"))
    assert words == ["distill.teacher=x/ckpt.pt", "seed=0", "name=small-warm"]
    assert [variant.name for variant in study.closure(["warm"])] == ["baseline", "warm"]


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("title: Small models", "titel: x", ["2 mistakes", "did you mean 'title'?", "missing"]),
        ("label: ternary,", "lable: ternary,", ["variants.1.lable", "did you mean 'label'?"]),
        ("baseline: baseline", "baseline: baselin", ["did you mean 'baseline'?"]),
        ("baseline: baseline", "twin: baseline", ["the key `twin` is called `baseline` now"]),
        (
            "bars:",
            "lines: [{title: x, variants: [[baseline, ternry]]}]\nbars:",
            ["lines.0", "did you mean 'ternary'?"],
        ),
        (
            "headline: {ternary: ternary,",
            "also: [{ternary: ternray, baseline: baseline}]\nheadline: {ternary: ternary,",
            ["also.0", "did you mean 'ternary'?"],
        ),
        ("of: baseline, ternarize: row", "of: baseline", ["ternarized or packed"]),
        ("of: baseline, ternarize: row", "ternarize: row", ["need `of`"]),
        ("of: baseline, ternarize: row", "eps_scale: 0.99", ["need `of`"]),
        (
            "of: baseline, ternarize: row",
            "of: baseline, eps_scale: 0",
            ["variants.3.eps_scale: got 0", "greater than 0"],
        ),
        (
            "pack: {codec: t5, ",
            "ternarize: row, eps_scale: 0.99, pack: {codec: t5, ",
            ["ternarized or packed"],
        ),
        ("of: baseline,", "of: packed,", ["ptq.of", "no trained variant above"]),
        ("of: baseline,", "of: baseline, seeds: [7],", ["ptq.seeds", "baseline does not have"]),
        ("of: baseline,", "of: baseline, steps: [15],", ["ptq.steps", "baseline is not kept"]),
        ("name: ternary,", "name: baseline,", ["'baseline' stands twice"]),
        ("steps: [10, 20, 40]", "steps: [10, 50]", ["step 50 of baseline", "train.steps = 40"]),
        ("n: 40,", "n: yes,", ["evaluation.n", "yes/no"]),
        ("[ternary.enabled=false]", "[ternary.enabld=no]", ["did you mean 'enabled'?"]),
        ("[ternary.enabled=false]", '["model.dim=$after"]', ["`after` and $after"]),
    ],
)
def test_mistakes(study_file: Path, old: str, new: str, parts: list[str]) -> None:
    text = study_file.read_text()
    assert old in text
    study_file.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as error:
        load_study(study_file)
    for part in parts:
        assert part in str(error.value)


def test_a_missing_study_names_its_neighbours(tmp_path: Path, study_file: Path) -> None:
    with pytest.raises(InputFileError, match=r"study not found.*available studies: .*small\.yaml"):
        load_study(tmp_path / "smal.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_whole(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# terdit study recipes/studies/{path.name}")
    study = load_study(path)
    assert study.name == path.stem
