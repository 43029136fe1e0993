"""The recipe: shipped files, strictness, overrides, hostile files, hash."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.recipe import Recipe, load_recipe, parse_recipe
from terdit_cli.strict_yaml import LARGEST_FILE, MOST_MISTAKES, MOST_NODES
from terdit_cli.train.build import model_config

RECIPES = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml"))
GOOD = "name: try\ndata: {source: embedded, image_size: 28, channels: 1}\nmodel: {patch_size: 7}\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "try.yaml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_start_with_their_command(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert model_config(recipe).input_size == recipe.input_size
    words = path.read_text(encoding="utf-8").splitlines()[0].split()
    assert words[0] == "#"
    assert "terdit" in words
    assert str(path.relative_to(RECIPES.parent)) in words
    assert "train" in words
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    load_recipe(path, overrides)


def test_there_are_shipped_recipes() -> None:
    assert {"quickstart", "600m", "4.2b"} <= {path.stem for path in SHIPPED}


def test_all_mistakes_at_once_with_path_and_nearest_key(recipe_file: Path) -> None:
    words = ["train.stepz=3", "optim.lr=fast", "trian.steps=1", "train.compile=3", "data.flip=7.5"]
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file, [*words, "sample.sampler=ddp", "ema.decay=2", "data.channels=2"])
    message = str(caught.value)
    assert "8 mistakes" in message
    assert "train.stepz: unknown key (did you mean 'steps'?)" in message
    assert "trian: unknown key (did you mean 'train'?)" in message
    assert "optim.lr: got 'fast'" in message
    assert "train.compile: got 3" in message
    assert "data.flip: got 7.5" in message
    assert "sample.sampler: got 'ddp'" in message
    assert "did you mean 'ddpm'?" in message
    assert "ema.decay: got 2" in message
    assert "data.channels: got 2" in message
    assert str(recipe_file) in message
    assert "Fix: " in message
    assert caught.value.exit_code == 2


def test_an_unknown_key_near_nothing_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"ema\.zzzzzz: unknown key, known are decay, warmup"):
        parse_recipe({"name": "a", "ema": {"zzzzzz": 1}}, "here")


def test_a_missing_name_is_named() -> None:
    with pytest.raises(UsageError, match="name: missing"):
        parse_recipe({}, "here")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a" * 65, "two words"])
def test_names_that_are_no_folder_name_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="name: got"):
        parse_recipe({"name": name}, "here")


@pytest.mark.parametrize(
    "word",
    [
        "train.steps=yes",
        "optim.lr=true",
        "optim.grad_clip=no",
        "data.channels=true",
        "seed=on",
        "optim.betas=[yes, 0.9]",
        "optim.drop_at=[yes]",
    ],
)
def test_yes_is_no_number(recipe_file: Path, word: str) -> None:
    with pytest.raises(UsageError, match=word.split("=")[0].replace(".", r"\.")):
        load_recipe(recipe_file, [word])


def test_yes_is_a_switch(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.compile=yes", "ternary.adaln_norm=no"])
    assert recipe.train.compile is True
    assert recipe.ternary.adaln_norm is False


def test_numbers_that_yaml_reads_as_text(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["optim.lr=1e-4"]).optim.lr == 1e-4
    recipe_file.write_text(GOOD + "optim: {lr: 2e-3, eps: 1e-8}\n")
    assert load_recipe(recipe_file).optim.lr == 2e-3


@pytest.mark.parametrize(
    "word",
    [
        "optim.lr=.nan",
        "optim.lr=.inf",
        "optim.lr=0",
        "optim.lr=-1",
        "optim.betas=[0.9, 1]",
        "train.steps=0",
        "parallel.hang_seconds=.inf",
        "distill.features=1",  # without a teacher
    ],
)
def test_impossible_numbers(recipe_file: Path, word: str) -> None:
    with pytest.raises(UsageError, match="1 mistake"):
        load_recipe(recipe_file, [word])


def test_a_repeated_key_is_an_error(recipe_file: Path) -> None:
    recipe_file.write_text("name: a\noptim:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(InputFileError, match="'lr' is given twice") as caught:
        load_recipe(recipe_file)
    assert "line 4" in str(caught.value)


def test_overrides_nested_split_at_the_first_equals_sign(recipe_file: Path) -> None:
    words = ["data.vae=/models/a=b/vae", "data.image_size=64", "model.patch_size=2", "name=x"]
    recipe = load_recipe(recipe_file, [*words, "checkpoint.keep_last=7", "optim.drop_at=[0.5, 1]"])
    assert recipe.data.vae == "/models/a=b/vae"
    assert recipe.name == "x"
    assert recipe.checkpoint.keep_last == 7  # a section that the file does not have
    assert recipe.optim.drop_at == (0.5, 1.0)
    assert recipe.data.channels == 1  # kept from the file
    assert (recipe.in_channels, recipe.input_size) == (4, 8)


def test_an_override_into_an_empty_section(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD + "ema:\n")
    assert load_recipe(recipe_file, ["ema.decay=0.5"]).ema.decay == 0.5


def test_a_later_override_wins(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("word", ["seed", "=3", "", "lr"])
def test_words_that_are_no_overrides(recipe_file: Path, word: str) -> None:
    with pytest.raises(UsageError, match="not key=value") as caught:
        load_recipe(recipe_file, [word])
    assert repr(word) in str(caught.value)


@pytest.mark.slow
def test_overrides_below_plain_values_and_broken_values(recipe_file: Path) -> None:
    with pytest.raises(UsageError, match="single value") as caught:
        load_recipe(recipe_file, ["name.first=x"])
    assert "'name.first=x'" in str(caught.value)
    for word in ("optim.betas=[1", "name={a: 1, a: 2}", "seed=" + "[" * 5000):
        with pytest.raises(UsageError, match="not valid YAML"):
            load_recipe(recipe_file, [word])
    # YAML would take the rest for a comment, and train on whatever lies in /data/set.
    with pytest.raises(UsageError, match=r"not valid YAML: got 'data\.path=/data/set #2'.*quote"):
        load_recipe(recipe_file, ["data.path=/data/set #2"])
    folder = "data.source=folder"
    quoted = load_recipe(recipe_file, [folder, "data.path='/data/set #2'"])
    assert quoted.data.path == Path("/data/set #2")
    assert load_recipe(recipe_file, [folder, "data.path=~/set"]).data.path == Path.home() / "set"
    with pytest.raises(UsageError, match=r"model: got 5"):
        load_recipe(recipe_file, ["model=5"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "an empty file"),
        (b"# only a comment\n", "an empty file"),
        (b"- a\n- b\n", "a list"),
        (b"just text", "a str"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is not UTF-8 text"),
        (b"name: a\x00b", "not UTF-8 text: got UTF-16"),
        ("name: caf\u00e9\n".encode("utf-16"), "not UTF-8 text: got UTF-16"),
        ("name: a\n".encode("utf-16-le"), "not UTF-8 text: got UTF-16"),
        ("a: 1\nname: caf\u00e9\n".encode("latin-1"), "got byte 0xe9 in line 2, perhaps Latin-1"),
        (b"name: [a", "not valid YAML"),
        (b"{[1]: 2}", "not valid YAML"),
        (b"name: 2001-99-99", "not valid YAML"),
        (b"a: " + b"[" * 20000, "not valid YAML"),
        (b"name: !!python/object/apply:os.system ['echo']", "not valid YAML"),
        (b"#" * (LARGEST_FILE + 1), "too large"),
    ],
    ids=lambda value: value[:16] if isinstance(value, bytes) else "",
)
def test_files_that_are_no_recipe(recipe_file: Path, content: bytes, match: str) -> None:
    recipe_file.write_bytes(content)
    with pytest.raises(InputFileError, match=match) as caught:
        load_recipe(recipe_file)
    assert str(recipe_file) in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"k{key}: 1\n" for key in range(60_000)),
        "a:\n" + "".join(f"- k{key}: 1\n" for key in range(60_000)),
        "a: [" + ",".join("1" * 400_000) + "]",
        "{" + ",".join(f"k{key}: {{a: 1}}" for key in range(40_000)) + "}",
    ],
    ids=["keys", "list", "numbers", "nested"],
)
def test_a_file_of_very_many_keys_is_refused_at_once(recipe_file: Path, text: str) -> None:
    recipe_file.write_text(text)
    started = time.process_time()
    with pytest.raises(UsageError, match=f"too long: got more than {MOST_NODES} keys") as caught:
        load_recipe(recipe_file)
    assert time.process_time() - started < 10
    assert caught.value.exit_code == 2


def test_of_very_many_mistakes_the_first_are_told(recipe_file: Path) -> None:
    keys = MOST_NODES // 2 - 8
    recipe_file.write_text("train:\n" + "".join(f"  k{key}: 1\n" for key in range(keys)))
    with pytest.raises(UsageError, match=f"{keys + 1} mistakes:\n") as caught:
        load_recipe(recipe_file)
    assert f"and {keys + 1 - MOST_MISTAKES} more" in str(caught.value)
    assert "train.k7: unknown key" in str(caught.value)
    assert len(str(caught.value).splitlines()) < MOST_MISTAKES + 5


def test_a_byte_order_mark_is_no_mistake(recipe_file: Path) -> None:
    """Windows' editors write one at the start of UTF-8."""
    recipe_file.write_bytes(b"\xef\xbb\xbf" + b"name: marked\n")
    assert load_recipe(recipe_file).name == "marked"


def test_a_missing_file_names_the_recipes_beside_it(recipe_file: Path) -> None:
    with pytest.raises(InputFileError, match="recipe not found") as caught:
        load_recipe(recipe_file.with_name("tri.yaml"))
    assert f"available recipes: {recipe_file}" in str(caught.value)
    with pytest.raises(InputFileError, match="Is a directory"):
        load_recipe(recipe_file.parent)
    with pytest.raises(InputFileError, match=r"give the path of a \.yaml file"):
        load_recipe(recipe_file.parent / "nowhere" / "a.yaml")


def test_alias_bombs_are_refused_before_they_grow(recipe_file: Path) -> None:
    levels = ["a0: &a0 [1, 1]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    merges = ["m0: &m0 {x: 1}"]
    merges += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 30)]
    for text in ("\n".join(levels), "\n".join(merges), "a: &a {b: *a}"):
        recipe_file.write_text("name: a\n" + text)
        with pytest.raises(InputFileError, match="aliases"):
            load_recipe(recipe_file)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_round_trip_keeps_the_hash(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["optim.lr=1.7e-5", "name=x"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(copy)
    assert again == recipe
    assert again.sha256() == recipe.sha256()
    assert load_recipe(copy, ["seed=1"]).sha256() != recipe.sha256()


def test_the_hash_does_not_depend_on_the_layout(recipe_file: Path) -> None:
    before = load_recipe(recipe_file).sha256()
    values = yaml.safe_load(GOOD)
    recipe_file.write_text("# text\n" + yaml.safe_dump(dict(reversed(values.items()))))
    assert load_recipe(recipe_file).sha256() == before
    assert load_recipe(recipe_file, ["train.steps=400000"]).sha256() == before  # the default


_values: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**70),
    "name": st.from_regex(r"\A[A-Za-z][A-Za-z0-9._-]{0,20}\Z").filter(
        lambda text: isinstance(yaml.safe_load(text), str)
    ),
    "optim.lr": st.floats(1e-30, 1e30),
    "optim.grad_clip": st.none() | st.floats(1e-6, 1e6),
    "optim.drop_at": st.lists(st.floats(0, 1), max_size=4).map(tuple),
    "train.steps": st.integers(1, 10**12),
    "train.compile": st.booleans(),
    "ternary.granularity": st.sampled_from(["tensor", "row", "group128"]),
    "ternary.adaln_norm": st.sampled_from([None, True, False]),
    "data.vae": st.none() | st.text(st.characters(codec="utf-8", categories=["L", "P"])),
}


@pytest.mark.slow
@given(st.fixed_dictionaries({}, optional=_values))
def test_overrides_round_trip(wanted: dict[str, Any]) -> None:
    plain = {
        key: list(value) if isinstance(value, tuple) else value for key, value in wanted.items()
    }
    words = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=math.inf)}"
        for key, value in plain.items()
    ]
    recipe = load_recipe(RECIPES / "4.2b.yaml", words)
    for key, value in wanted.items():
        found: Any = recipe
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value


def test_sizes_that_do_not_divide(recipe_file: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file, ["train.global_batch_size=10", "train.micro_batch_size=4"])
    assert "train.global_batch_size 10 must be a multiple of train.micro_batch_size 4" in str(
        caught.value
    )
    with pytest.raises(UsageError, match=r"image_size 28 must be a multiple of 5"):
        load_recipe(recipe_file, ["model.patch_size=5"])
    with pytest.raises(UsageError, match=r"data.image_size 28 must be a multiple of 8"):
        load_recipe(recipe_file, ["data.vae=some/vae"])
    with pytest.raises(UsageError, match=r"image_size 24 must be a multiple of 16"):
        load_recipe(recipe_file, ["data.vae=a/b", "data.image_size=24", "model.patch_size=2"])


def test_a_source_without_its_path(recipe_file: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.path is needed for source 'zip'"):
        load_recipe(recipe_file, ["data.source=zip"])


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["parallel.shard_size=2"], "parallel.shard_size needs parallel.mode=hsdp, not 'ddp'"),
        (["parallel.cpu_offload=true"], "parallel.cpu_offload needs parallel.mode=fsdp or hsdp"),
        (
            ["parallel.cpu_offload=true", "parallel.mode=fsdp"],
            "parallel.cpu_offload needs ternary.enabled=false",
        ),
    ],
)
def test_options_of_other_modes(recipe_file: Path, words: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        load_recipe(recipe_file, words)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("chosen", [None, True, False])
def test_adaln_norm_follows_the_quantiser(
    recipe_file: Path, enabled: bool, chosen: bool | None
) -> None:
    words = [
        f"ternary.enabled={enabled}",
        f"ternary.adaln_norm={'null' if chosen is None else chosen}",
    ]
    config = model_config(load_recipe(recipe_file, words))
    assert config.adaln_norm is (enabled if chosen is None else chosen)


def test_a_recipe_never_changes() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe(name="a").seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("logging.wandb=true", "got True, yes/no; expected {project: PROJECT}"),
        ("logging.wandb=my-project", "got 'my-project', expected {project: PROJECT}"),
        ("model=5", "model: got 5, expected {size, dim, ...}"),
        ("train.steps=yes", "got True, yes/no; expected another value"),
    ],
)
def test_sections_are_shown_as_they_are_written(recipe_file: Path, word: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file, [word])
    assert message in str(caught.value)
