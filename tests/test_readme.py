"""What the README and the help texts promise exists: commands, options, files, make targets."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from terdit_cli.cli import app
from terdit_cli.recipe import find_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, flags=re.DOTALL)
COMMAND = typer.main.get_command(app.app)


def shell_lines() -> list[str]:
    """Every whole `terdit ...` line of the README's blocks, continuation lines joined."""
    text = "\n".join(BLOCKS).replace("\\\n", " ")
    lines = [line.partition(" #")[0].strip() for line in text.splitlines()]
    # A line with a choice (|) or an optional part ([...]) is a synopsis, not a command.
    return [line for line in lines if line.startswith("terdit ") and not re.search(r"[|\[]", line)]


def example_lines() -> list[str]:
    """The examples in the epilog of every verb, and the first line of every recipe."""
    found = []
    for verb in COMMAND.commands.values():  # type: ignore[attr-defined]
        found += [line.strip() for line in (verb.epilog or "").splitlines()]
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        found.append(recipe.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    return [line for line in found if line.startswith("terdit ")]


def test_there_are_commands_to_check() -> None:
    assert len(shell_lines()) >= 5
    assert {line.split()[1] for line in example_lines()} == set(COMMAND.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", [*shell_lines(), *example_lines()])
def test_every_command_parses(line: str) -> None:
    """Unknown verbs, options and values raise; nothing runs."""
    verb, *words = shlex.split(line.partition(" > ")[0])[1:]
    command = COMMAND.commands[verb]  # type: ignore[attr-defined]
    context = command.make_context(verb, words, resilient_parsing=False)
    assert context.params
    recipe = context.params.get("recipe")
    made = ("photos.yaml",)  # by the command before it
    assert recipe is None or str(recipe) in made or find_recipe(recipe).is_file()


def test_every_path_of_the_file_tour_exists() -> None:
    tour = README.partition("## Tour")[2].partition("```")[2].partition("```")[0]
    paths = re.findall(r"(?<!\S)((?:terdit_cli|recipes|tests)/\S*)", tour)
    assert len(paths) >= 10
    for path in paths:
        assert (ROOT / path).exists(), path
    for line in tour.splitlines():
        folder = line.split()[0] if line.split() else ""
        for name in re.findall(r"\b(\w+\.py)\b(?!/)", line):
            places = [ROOT / folder / name, ROOT / "terdit_cli" / name]
            assert any(place.exists() for place in places), (folder, name)


def test_every_recipe_of_the_table_exists_and_is_listed() -> None:
    table = README.partition("| recipe |")[2].partition("\n\n")[0]
    listed = set(re.findall(r"`([\w.-]+)`", table))
    assert listed == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"\bmake (\w[\w-]*)", README)
    assert {"demo", "test", "test-all", "results"} <= set(targets)
    for target in targets:
        if target not in ("prints",):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/README.md"])
def test_links_and_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"`((?:terdit_cli|tests|docs|recipes)/[\w./-]+)`", text)
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_front_door_is_short() -> None:
    assert len(README.encode()) <= 12_000
