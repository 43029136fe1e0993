"""`terdit study`: its words, what it refuses, and what it prints of a study that is there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from terdit_cli.cli import study_cli as app_study
from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.lab.study import run_study as command
from terdit_cli.lab.study.archive import opened
from terdit_cli.lab.study.records import Folder, differences, essence
from terdit_cli.lab.study.spec import Study, load_study
from terdit_cli.recipe import load_recipe

ROOT = Path(__file__).parents[3]


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer(pretty_exceptions_enable=False)
    made.command()(app_study.study)
    return made


@pytest.mark.slow
def test_pages_of_what_is_there(
    app: typer.Typer, study_file: Path, tmp_path: Path, invent: Callable[[Study, Folder], None]
) -> None:
    study = load_study(study_file)
    invent(study, Folder(tmp_path / "runs" / study.name))
    out = tmp_path / "docs" / "results.md"
    words = [str(study_file), "--render", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    values = json.loads(done.stdout)
    assert values["studies"] == ["small"]
    assert values["missing"] == 0
    assert "CFG scale 2 1.060, met" in values["verdicts"][0]
    assert out.exists()
    assert out.with_suffix(".html").exists()
    plain = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "ternary : baseline" in plain.stdout


def test_words_with_an_equals_sign_change_the_recipes(
    app: typer.Typer, study_file: Path, tmp_path: Path
) -> None:
    words = [str(study_file), "optim.lr=hello", "--render", "--out", str(tmp_path / "r.md")]
    with pytest.raises(UsageError, match=r"optim\.lr.*hello"):
        CliRunner().invoke(app, words, catch_exceptions=False)


@pytest.mark.slow
def test_several_studies_share_a_page(
    study_file: Path, tmp_path: Path, invent: Callable[[Study, Folder], None]
) -> None:
    other = study_file.with_name("other.yaml")
    other.write_text(study_file.read_text().replace("name: small", "name: other", 1))
    out = tmp_path / "r.md"
    invent(load_study(other), Folder(tmp_path / "runs" / "other"))
    result = command.run([study_file, other], render=True, runs=tmp_path / "runs", out=out)
    assert result.studies == ["small", "other"]
    assert result.missing > 0
    assert out.read_text().count("## Small models") == 2


@pytest.mark.slow
def test_pages_are_made_again_of_the_words_that_a_study_was_run_with(
    study_file: Path, tmp_path: Path, invent: Callable[[Study, Folder], None]
) -> None:
    """Or every model would be said to be of other settings than the study's."""
    runs, out = tmp_path / "runs", tmp_path / "r.md"
    study = load_study(study_file, ["optim.lr=1e-5"])
    invent(study, Folder(runs / study.name))
    command.run([study_file], render=True, runs=runs, out=out)
    assert "other settings" in out.read_text()
    (runs / study.name / command.RESOLVED).write_text(study.to_yaml())
    command.run([study_file], render=True, runs=runs, out=out)
    assert "other settings" not in out.read_text()
    tables = out.with_name(f"{out.stem}-tables.md").read_text()
    assert f"terdit study {study_file} optim.lr=1e-5)" in tables
    command.run([study_file], ["optim.lr=1e-4"], render=True, runs=runs, out=out)
    assert "other settings" in out.read_text()


def test_a_refused_study_changes_nothing(
    study_file: Path, tmp_path: Path, invent: Callable[[Study, Folder], None]
) -> None:
    """Its words are those by which the pages are made again."""
    runs = tmp_path / "runs"
    study = load_study(study_file)
    invent(study, Folder(runs / study.name))
    kept = runs / study.name / command.RESOLVED
    kept.write_text("as it was")
    with pytest.raises(UsageError, match="of other settings"):
        command.run([study_file], ["optim.lr=1e-5"], runs=runs, out=tmp_path / "r.md")
    assert kept.read_text() == "as it was"


def test_a_page_is_not_replaced_by_nothing(study_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.md"
    out.write_text("a page")
    with pytest.raises(UsageError, match=r"nothing to show yet.*without --render"):
        command.run([study_file], render=True, runs=tmp_path / "runs", out=out)
    assert out.read_text() == "a page"


def test_what_is_refused(study_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no study"):
        command.run([])
    with pytest.raises(UsageError, match=r"wrong name for --out.*r\.md"):
        command.run([study_file], out=tmp_path / "r.html")
    with pytest.raises(UsageError, match="--only is for one study"):
        command.run([study_file, study_file], only=["baseline"], out=tmp_path / "r.md")
    with pytest.raises(UsageError, match="two studies of one name"):
        command.run([study_file, study_file], out=tmp_path / "r.md")
    with pytest.raises(UsageError, match="no such variant"):
        command.run([study_file], only=["x"], runs=tmp_path / "runs", out=tmp_path / "r.md")
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        command.run([study_file], out=tmp_path / "file" / "r.md")


@pytest.mark.slow
def test_the_page_of_results_is_what_its_records_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make results` in a fresh checkout makes the page that is there."""
    monkeypatch.chdir(ROOT)
    names = ("fashion-mnist", "cifar10", "ablations")
    paths = [Path(f"recipes/studies/{name}.yaml") for name in names]
    command.run(paths, render=True, runs=Path("docs/studies"), out=tmp_path / "results.md")
    for made in (*tmp_path.glob("*.md"), *tmp_path.rglob("*.svg")):
        kept = ROOT / "docs" / made.relative_to(tmp_path)
        assert kept.read_text(encoding="utf-8") == made.read_text(encoding="utf-8"), made.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "ablations"])
def test_the_training_commands_of_the_page_train_what_was_trained(name: str) -> None:
    """Though recipes have got other defaults since."""
    lines = (ROOT / "docs/results-tables.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(f"## {load_study(ROOT / 'recipes/studies' / f'{name}.yaml').title}")
    made = {}
    for line in lines[start:]:
        if line.startswith(f"terdit train recipes/{name.replace('ablations', 'quickstart')}.yaml "):
            _, _, recipe, *words = shlex.split(line)
            if not any(word.startswith("train.init_from=") for word in words):
                values = essence(load_recipe(ROOT / recipe, words))
                made[words[-1], words[-2]] = values
    assert made
    for (run, seed), values in made.items():
        variant = run.removeprefix(f"name={name}-")
        with opened(ROOT / "docs/studies", name) as folder:
            record = folder / variant / seed.replace("=", "-") / "train.json"
            asked = json.loads(record.read_text(encoding="utf-8"))["asked"]
        assert not differences(asked, json.loads(json.dumps({"recipe": values}))), (variant, seed)
