"""Packaged models: found by name and by class, listed, sampled as their cards advise."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import terdit_cli
from terdit_cli.cli import models_cli as app_models
from terdit_cli.commands import eval_fid, sample
from terdit_cli.commands import models as command
from terdit_cli.diffusion.sampler import SamplerConfig
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.evaluate.request import EvalOptions
from terdit_cli.generate.find_model import find_model
from terdit_cli.generate.generator import sampler_for
from terdit_cli.generate.options import SamplingOptions
from terdit_cli.hub import catalogue
from terdit_cli.hub.card import Advice, Card, parse_card, read_card
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.lab.add_model import network_facts
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.pack.tdt import TdtFile
from tests.ckpt_file import save_ckpt

CARD = {
    "name": "clothes",
    "data": "1,000 images of Fashion-MNIST: a test",
    "licence": "MIT",
    "recipe": "small",
    "steps": 30,
    "seed": 0,
    "scores": {"fd-grid": 31.5, "precision": 0.25},
    "measured": "100 images",
    "sampler": {"name": "dpmpp-2m", "steps": 3, "cfg_scale": 1.5, "eps_scale": 0.99},
    "limits": "draws noise",
    "network": {
        "parameters": 9,
        "ternary": 8,
        "image_size": 28,
        "channels": 1,
        "classes": ["a", "b"],
    },
    "sha256": "0" * 64,
}
TEXT = "# clothes\n\nA test.\n"
Make = Callable[..., Path]


@pytest.fixture
def package(shelf: Path, small_tdt: Path) -> Make:
    """Return package(name, model=small_tdt, **fields of the card): puts a model on the shelf."""

    def put(name: str, model: Path = small_tdt, **fields: object) -> Path:
        path = shelf / f"{name}.tdt"
        shutil.copy(model, path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        known = {**CARD, "name": name, "network": network_facts(path), "sha256": sha256}
        values = {**known, "text": TEXT, **fields}
        (shelf / f"{name}.md").write_text(Card.model_validate(values).to_markdown())
        return path

    return put


@pytest.fixture
def animals(tmp_path: Path, small_run: Path, terdit: Callable[..., Any]) -> Path:
    """The .tdt of another model, whose classes are animals, but for one."""
    found = load_ckpt(small_run / "ckpt.pt")
    info = found.info.to_dict()
    names = ["cat", "dog", "fox", "cow", "hen", "owl", "elk", "ant", "bee", "Bag"]
    other = type(found.info).from_dict({**info, "class_names": names}, "test")
    save_ckpt(tmp_path / "animals.pt", other, found.recipe, found.model, found.ema)
    path = tmp_path / "animals.tdt"
    assert terdit("pack", tmp_path / "animals.pt", "-o", path).code == 0
    return path


def said(call: Callable[[], Any]) -> tuple[Any, str, str]:
    """Return what a call returns, and its stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        value = call()
    return value, out.getvalue(), err.getvalue()


def models_verb(*words: str) -> str:
    """Return the stdout of the verb `terdit models`."""
    app = typer.Typer()
    app.command()(app_models.models)
    _, out, err = said(lambda: app(list(words), standalone_mode=False))
    assert err == ""
    return str(out)


def test_what_is_packaged_is_whole() -> None:
    """Of this checkout: every model has its card, both fit, and they are small enough."""
    folder = Path(catalogue.__file__).parent
    names = sorted(path.stem for path in folder.glob("*.tdt"))
    assert names == sorted(path.stem for path in folder.glob("*.md"))
    total = 0
    for name in names:
        content = (folder / f"{name}.tdt").read_bytes()
        text = (folder / f"{name}.md").read_text(encoding="utf-8")
        card = parse_card(text, folder / f"{name}.md")
        assert (card.name, card.sha256) == (name, hashlib.sha256(content).hexdigest())
        assert card.network.model_dump() == network_facts(folder / f"{name}.tdt")
        SamplerConfig(**card.sampler.model_dump())
        with TdtFile(folder / f"{name}.tdt") as file:
            assert file.info.step == card.steps
            assert file.info.class_names
            assert file.info.space.kind == "pixel", "nothing may have to be downloaded"
        total += len(content) + len(text.encode())
    assert total <= catalogue.SIZE_LIMIT


def test_the_catalogue_and_the_cards_need_no_torch() -> None:
    code = "import sys, terdit_cli.hub.card, terdit_cli.cli.models_cli as a; a.models"
    code += "; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_names_and_paths(package: Make, shelf: Path, small_run: Path) -> None:
    path = package("clothes")
    assert catalogue.names() == ["clothes"]
    assert catalogue.resolve("clothes") == catalogue.path_of("clothes") == path
    assert catalogue.name_of(path) == "clothes"
    assert catalogue.name_of(Path("clothes.tdt")) is None
    # A folder of images that is called as the model, and then a model that is.
    Path("clothes").mkdir()
    assert catalogue.resolve("clothes") == path
    shutil.copy(small_run / "ckpt.pt", "clothes/ckpt.pt")
    assert catalogue.resolve("clothes") == Path("clothes")
    shutil.rmtree("clothes")
    Path("clothes").write_text("a file")
    assert catalogue.resolve(Path("clothes")) == Path("clothes")
    Path("empty").mkdir()
    assert catalogue.resolve("empty") == Path("empty")


def test_names_that_there_are_not(package: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputFileError) as caught:
        catalogue.resolve("cloths")
    assert "got 'cloths', expected a file, a folder (cloths). Fix: check the path." in str(
        caught.value
    )
    package("clothes")
    with pytest.raises(InputFileError) as caught:
        terdit_cli.load_model("cloths")
    message = str(caught.value)
    assert "no such model: got 'cloths' (did you mean 'clothes'?)" in message
    assert "a packaged model: clothes (cloths). Fix: check the path, or see `terdit mod" in message
    with pytest.raises(UsageError, match=r"got 'cloths' \(did you mean 'clothes'\?\)") as wrong:
        command.run("cloths")
    assert "Fix: see `terdit models`" in str(wrong.value)
    monkeypatch.setenv("TERDIT_MODELS", "nowhere")
    with pytest.raises(
        UsageError, match=r"TERDIT_MODELS is not a folder: got nowhere\. Fix: unset"
    ):
        catalogue.names()


def test_load_model_by_name(package: Make, small_tdt: Path) -> None:
    package("clothes")
    named = terdit_cli.load_model("clothes", backend="reference")
    wanted = terdit_cli.load_model(small_tdt, backend="reference")
    x, t, y = torch.randn(2, 1, 28, 28), torch.tensor([0, 999]), torch.tensor([0, 10])
    with torch.inference_mode():
        assert torch.equal(named(x, t, y), wanted(x, t, y))


def test_the_list(package: Make, shelf: Path) -> None:
    assert json.loads(models_verb("--json")) == {"models": []}
    path = package("clothes")
    package("shirts", scores={"FID": 3.25})
    lines = models_verb().splitlines()
    assert lines[1].split() == ["name", "bytes", "parameters", "classes", "score", "data"]
    [clothes] = [line for line in lines if line.startswith("clothes")]
    size = f"{path.stat().st_size:,}"
    assert clothes.split()[:4] == ["clothes", size, "56,658", "10"]
    assert " fd-grid 31.5 " in clothes
    assert CARD["data"] in clothes
    assert any(line.startswith("shirts") and " FID 3.25 " in line for line in lines)
    found = json.loads(models_verb("--json"))["models"]
    assert [model["name"] for model in found] == ["clothes", "shirts"]
    assert found[0]["file_bytes"] == path.stat().st_size
    assert found[0]["parameters"] == 56_658
    assert found[0]["classes"][7] == "Sneaker"
    assert found[0]["card"]["sampler"] == CARD["sampler"]


def test_a_card(package: Make, shelf: Path) -> None:
    package("clothes", limits="draws [noise]")
    out = models_verb("clothes")
    for part in (
        "draws [noise]",
        "Ankle boot",
        "dpmpp-2m, 3 steps, cfg scale 1.5",
        "fd-grid",
        "recipe small, 30 steps, seed 0",
        "--model clothes --prompt-class",
        TEXT.strip(),
    ):
        assert part in out  # fmt: skip
    assert json.loads(models_verb("clothes", "--json"))["card"]["limits"] == "draws [noise]"


def test_a_card_is_what_was_written() -> None:
    card = Card.model_validate({**CARD, "data": "\xe9: 'a' # b", "text": "---\nx\n"})
    assert parse_card(card.to_markdown(), Path("x.md")) == card
    assert card.score == ("fd-grid", 31.5)  # the first, not the first of the alphabet
    assert card.sampler == Advice(name="dpmpp-2m", steps=3, cfg_scale=1.5, eps_scale=0.99)


HEAD = Card.model_validate({**CARD, "text": TEXT}).to_markdown()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no head between two lines"),
        ("# clothes\n" + HEAD, "no head between two lines"),
        ("---\nname: clothes\n", "no head between two lines"),
        ("---\n[]\n---\n", "a head that is no mapping"),
        ("---\n- a: [\n---\n", "while parsing"),
        (HEAD.replace("seed: 0", "seed: 0\ntext: b"), "a head that is no mapping"),
        (HEAD.replace("seed: 0", "sed: 0"), "seed: Field required; sed: Extra inputs"),
        (HEAD.replace("steps: 30", "steps: many"), "steps: Input should be a valid integer"),
        (HEAD.replace("31.5", ".nan"), "scores.fd-grid: Input should be a finite number"),
        (HEAD.replace("cfg_scale: 1.5", "cfg: 1.5"), "sampler.cfg_scale: Field required"),
        (HEAD.replace("sha256: '0", "sha256: '"), "sha256: String should match"),
        (HEAD.replace("name: clothes", "name: shirts"), "the card of 'shirts'"),
        (HEAD.replace("name: clothes", "name: ../a"), "name: String should match"),
        (HEAD + "x" * (1 << 18), "more than 262144 bytes"),
    ],
    ids=lambda value: value[:24].strip().replace("\n", " "),
)
def test_wrong_cards(shelf: Path, text: str, part: str) -> None:
    (shelf / "clothes.md").write_text(text)
    with pytest.raises(InputFileError) as caught:
        read_card("clothes")
    message = str(caught.value)
    assert part in message
    assert str(shelf / "clothes.md") in message
    assert "expected a YAML header with name, data, licence" in message
    assert "Fix: " in message


def test_a_model_without_its_card_and_a_damaged_one(package: Make, shelf: Path) -> None:
    path = package("clothes")
    (shelf / "clothes.md").unlink()
    with pytest.raises(InputFileError, match=r"No such file.*clothes\.md"):
        command.run()
    package("clothes")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputFileError, match=r"is damaged, or its card.*clothes\.tdt"):
        command.run()


def test_the_card_of_another_model_is_noticed(package: Make) -> None:
    package("clothes", sha256="1" * 64)
    with pytest.raises(InputFileError, match=r"to another model.*expected 1{64}.*clothes\.tdt"):
        command.run()


def test_the_model_that_knows_the_class(
    package: Make, animals: Path, small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(prompt: str) -> str:
        file, out, err = said(lambda: find_model(None, prompt))
        assert out == ""
        assert f"No model given; using the packaged model {file.name} (`terdit models`)" in err
        return str(file.name)

    clothes = package("clothes")
    for prompt in ("sneaker", "SNEAKER, 3", "all", "no such class"):  # the only one, whatever
        assert chosen(prompt) == "clothes"
    package("animals", animals)
    assert chosen("sneaker") == "clothes"
    assert chosen("fox, bag") == "animals"
    with pytest.raises(UsageError) as caught:
        find_model(None, "bag")
    assert "several packaged models have this class: got 'bag'" in str(caught.value)
    assert "one of animals, clothes has. Fix: choose one: --model animals" in str(caught.value)
    for prompt in ("sneeker", "fox, sneaker"):
        with pytest.raises(UsageError) as caught:
            find_model(None, prompt)
        message = str(caught.value)
        assert f"no packaged model has this class: got {prompt!r}" in message
        assert "of animals: cat, dog, fox" in message
        assert "of clothes: T-shirt/top, Trouser" in message
    with pytest.raises(UsageError, match=r"did you mean 'sneaker'\?"):
        find_model(None, "sneeker")
    # Everything of the user's own comes first.
    assert find_model(Path("animals"), "sneaker").name == "animals"
    run = Path("runs/mine")
    run.mkdir(parents=True)
    shutil.copy(small_run / "ckpt.pt", run / "ckpt.pt")
    assert find_model(None, "sneaker").path == run / "ckpt.pt"
    shutil.copy(clothes, "mine.tdt")
    assert find_model(None, "sneaker").path == Path("mine.tdt")
    monkeypatch.setenv("TERDIT_MODEL", "animals")
    assert find_model(None, "sneaker").name == "animals"


ADVISED = SamplerConfig("dpmpp-2m", 3, 1.5, eps_scale=0.99)
_WORDS = "--sampler dpmpp-2m --steps 3 --cfg-scale 1.5 --eps-scale 0.99, from its card"


@pytest.mark.parametrize(
    ("given", "wanted", "line"),
    [
        ({}, ADVISED, f"clothes: {_WORDS}"),
        ({"eps_scale": 1.0}, replace(ADVISED, eps_scale=1.0), "--steps 3 --cfg-scale 1.5, from"),
        (
            {"sampler": "dpmpp-2m", "steps": 3, "cfg_scale": 1.5},
            ADVISED,
            "clothes: --eps-scale 0.99,",
        ),
        ({"steps": 9}, SamplerConfig("dpmpp-2m", 9, 1.5), "--sampler dpmpp-2m --cfg-scale 1.5,"),
        ({"sampler": "dpmpp-2m"}, ADVISED, "clothes: --steps 3 --cfg-scale 1.5 --eps-scale 0.99,"),
        ({"sampler": "ddpm"}, SamplerConfig("ddpm", 250, 1.5), "clothes: --cfg-scale 1.5,"),
        ({"cfg_scale": 1.0}, SamplerConfig("dpmpp-2m", 3, 1.0), "--sampler dpmpp-2m --steps 3,"),
        ({"sampler": "ddim", "cfg_scale": 1.0}, SamplerConfig("ddim", 250, 1.0), ""),
        ({"sampler": "euler", "steps": 7, "cfg_scale": 0.0}, SamplerConfig("euler", 7, 0.0), ""),
        ({"steps": 9, "eps_scale": 0.5}, SamplerConfig("dpmpp-2m", 9, 1.5, eps_scale=0.5), "dpmpp"),
    ],
    ids=str,
)
def test_the_advice_of_a_card(
    package: Make, small_tdt: Path, given: dict[str, Any], wanted: SamplerConfig, line: str
) -> None:
    config, _, err = said(
        lambda: sampler_for(ModelFile.open(package("clothes")), SamplingOptions(**given))
    )
    assert config == wanted
    assert line in err
    assert (err == "") == (line == "")
    other, _, err = said(
        lambda: sampler_for(ModelFile.open(small_tdt), SamplingOptions(**given))
    )  # no packaged model
    default = SamplerConfig()
    assert (other.name, other.steps, other.cfg_scale) == (
        given.get("sampler", default.name),
        given.get("steps", default.steps),
        given.get("cfg_scale", default.cfg_scale),
    )
    assert err == ""


def test_sample_with_no_other_argument(package: Make) -> None:
    path = package("clothes")
    result, _, err = said(lambda: sample.run("sneaker"))
    assert (result.model, result.output) == (path, Path("sample.png"))
    assert result.output.is_file()
    assert (result.sampler, result.steps, result.cfg_scale, result.nfe) == ("dpmpp-2m", 3, 1.5, 6)
    assert "the packaged model clothes" in err
    assert "from its card" in err
    again, _, _ = said(
        lambda: sample.run(
            "7",
            path,
            output=Path("b"),
            sampling=SamplingOptions(steps=3, sampler="dpmpp-2m", cfg_scale=1.5),
        )
    )
    assert again.model_sha256 == result.model_sha256


def test_eval_fid_by_name(
    package: Make, features: str, evaluate: Callable[..., Any], small_tdt: Path
) -> None:
    path = package("clothes")
    common = {"reference": "embedded:heldout", "n": 8, "backend": "reference"}
    by_name = evaluate(model=Path("clothes"), **common)
    how = by_name.provenance
    assert (how["model"], how["sampler"], how["steps"]) == (str(path), "dpmpp-2m", 3)
    sampler = {"sampler": "dpmpp-2m", "steps": 3, "cfg_scale": 1.5, "eps_scale": 0.99}
    assert by_name.metrics == evaluate(model=small_tdt, **sampler, **common).metrics
    with pytest.raises(InputFileError, match=r"did you mean 'clothes'\?"):
        eval_fid.run(
            EvalOptions(model=Path("cloths"), features=features, make_reference=Path("r.npz"))
        )


def test_the_verbs(package: Make, terdit: Callable[..., Any], features: str) -> None:
    path = package("clothes")
    done = terdit("sample", "--prompt-class", "sneaker", "--json")
    values = json.loads(done.out)
    assert (values["model"], values["sampler"], values["steps"]) == (str(path), "dpmpp-2m", 3)
    assert values["cfg_scale"] == 1.5
    assert values["eps_scale"] == 0.99
    assert _WORDS in done.err
    done = terdit("sample", "--prompt-class", 1, "--model", "clothes", "--steps", 2, "--json")
    assert json.loads(done.out)["nfe"] == 4
    words = ("--model", "clothes", "--features", features, "--reference", "embedded:heldout")
    done = terdit("eval-fid", *words, "-n", 4, "--cfg-scale", 1, "--json")
    how = json.loads(done.out)["provenance"]
    assert (how["sampler"], how["steps"], how["cfg_scale"]) == ("dpmpp-2m", 3, 1.0)
    assert how["eps_scale"] == 1.0  # another guidance than the one it was advised for
    assert "clothes" in terdit("models").out
    assert "try" in terdit("models", "clothes").out
    done = terdit("models", "cloths")
    assert (done.code, done.out) == (2, "")
    assert "did you mean 'clothes'?" in done.err
    done = terdit("sample", "--prompt-class", 1, "--model", "cloths")
    assert (done.code, done.out) == (3, "")
    assert "a packaged model: clothes" in done.err
