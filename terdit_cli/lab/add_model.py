"""Package a trained run: NAME.tdt and its card NAME.md, for developers of terdit.

    python -m terdit_cli.lab.add_model RUN NAME --eval result.json \\
        --data "..." --licence "..." --limits "..."

The scores must be of the very bytes that are packaged, at the sampler that the card advises:

    terdit pack RUN -o NAME.tdt --codec t5 --rest bf16
    terdit eval-fid --model NAME.tdt --reference ... -n 10000 --sampler ... --json > result.json

Run again for a better model of the same name, what people wrote into the card (data, licence,
limits and the text) stays unless it is given anew.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from terdit_cli import console
from terdit_cli.class_names import names_of_classes
from terdit_cli.commands import pack
from terdit_cli.errors import InputFileError, TerditError, UsageError
from terdit_cli.evaluate.result import EvalResult, load_result
from terdit_cli.hub import catalogue
from terdit_cli.hub.card import Card, make_card, read_card
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.model.ckpt import Checkpoint
from terdit_cli.pack.exported import count_weights
from terdit_cli.pack.tdt import RestDtype, TdtFile
from terdit_cli.system.atomic import atomic_path, file_sha256

RECIPE_HEADING = "## Recipe"


@dataclass(frozen=True)
class Words:
    """What only people can say of a model; None: as the present card says."""

    data: str | None = None
    licence: str | None = None
    limits: str | None = None
    text: str | None = None


def run(
    source: Path,
    name: str,
    evaluation: Path,
    words: Words,
    codec: Literal["t2", "t5"] = "t5",
    rest: RestDtype = "bf16",
) -> Path:
    """Pack a run, check that `evaluation` is of this file, and put it among the packaged models.

    Args:
        source: run folder or ckpt.pt.
        evaluation: what `terdit eval-fid --model ... --json` printed.

    Raises:
        InputFileError, EnvironmentProblem.
        UsageError: scores of another file, too many bytes, or words that are missing.
    """
    checkpoint = ModelFile.open(source).checkpoint()
    result = load_result(evaluation)
    target = catalogue.folder() / f"{name}.tdt"
    words = _complete(words, name)
    with tempfile.TemporaryDirectory(prefix="terdit-") as folder:
        packed = Path(folder) / target.name
        pack.run(source, packed, codec, rest)
        sha256 = file_sha256(packed)
        if result.provenance.get("model_sha256") != sha256:
            raise UsageError(
                "these are not the scores of this model",
                got=f"SHA-256 {result.provenance.get('model_sha256')}",
                expected=sha256,
                where=evaluation,
                fix=f"terdit pack {source} -o {name}.tdt --codec {codec} --rest {rest}, then "
                f"terdit eval-fid --model {name}.tdt ... --json > {evaluation}",
            )
        card = _card(name, checkpoint, result, words, network_facts(packed), sha256)
        content, markdown = packed.read_bytes(), card.to_markdown().encode()
    _check_size(name, len(content) + len(markdown))
    for path, data in ((target, content), (catalogue.card_path(name), markdown)):
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return target


def _complete(words: Words, name: str) -> Words:
    """Fill the words that were not given from the card there is; raises UsageError."""
    given = {key: value for key, value in vars(words).items() if value is not None}
    if len(given) == len(vars(words)):
        return words  # a damaged card can be made anew
    if catalogue.card_path(name).exists():
        card = read_card(name)
        kept = card.text.partition(RECIPE_HEADING)[0]
        return replace(Words(card.data, card.licence, card.limits, kept), **given)
    missing = [f"--{key}" for key in ("data", "licence", "limits") if not getattr(words, key)]
    if missing:
        raise UsageError(
            "a new card needs words", expected=", ".join(missing), where=catalogue.card_path(name),
            fix="say what it was trained on, under which licence, and what not to expect of it",
        )  # fmt: skip
    return words


def network_facts(path: Path) -> dict[str, Any]:
    """Return the fields of a card's `network`, read from a .tdt."""
    with TdtFile(path) as file:
        info, ternary = file.info, count_weights(file)
        scales = sum(file.alphas(matrix).numel() for matrix in file.ternary_names())
        others = sum(file.rest(key).numel() for key in file.rest_names())
    names = names_of_classes(info.class_names, info.config.num_classes)
    return {
        "parameters": ternary + scales + others,
        "ternary": ternary,
        "image_size": info.image_size,
        "channels": info.config.in_channels,
        "classes": [group[0] for group in names],
    }


def _card(
    name: str,
    checkpoint: Checkpoint,
    result: EvalResult,
    words: Words,
    network: dict[str, Any],
    sha256: str,
) -> Card:
    recipe = yaml.safe_load(checkpoint.recipe) or {}
    how = result.provenance
    others = {key: value for key, value in result.metrics.items() if key != result.distance_name}
    against = "a reference" if result.n_reference is None else f"{result.n_reference:,}"
    text = (words.text or f"# {name}\n").strip()
    return make_card(
        {
            "name": name,
            "data": words.data,
            "licence": words.licence,
            "recipe": recipe.get("name"),
            "steps": checkpoint.info.step,
            "seed": recipe.get("seed"),
            "began_with": _beginning(recipe),
            "scores": {result.distance_name: result.distance, **others},
            "measured": f"{result.n:,} images against {against}, seed {how.get('seed')}, "
            f"activations {how.get('activations')}; {how.get('command')}",
            "sampler": {
                "name": how.get("sampler"),
                "steps": how.get("steps"),
                "cfg_scale": how.get("cfg_scale"),
                "eps_scale": how.get("eps_scale", 1.0),
            },
            "limits": words.limits,
            "network": network,
            "sha256": sha256,
            "text": f"{text}\n\n{RECIPE_HEADING}\n\n```yaml\n{checkpoint.recipe.strip()}\n```\n",
        },
        where=name,
    )


def _beginning(recipe: dict[str, Any]) -> str | None:
    """Return what a run was initialised and distilled from; None without either."""
    start = recipe.get("train", {}).get("init_from")
    if start is None:
        return None
    found = ModelFile.open(start).checkpoint()
    name = (yaml.safe_load(found.recipe) or {}).get("name")
    taught = ", and learned from it" if recipe.get("distill", {}).get("teacher") == start else ""
    return f"the averaged weights of {name}, {found.info.step or 0:,} steps{taught}"


def _check_size(name: str, added: int) -> None:
    """Raise UsageError if all packaged models and cards together become too large."""
    others = (
        path.stat().st_size
        for other in catalogue.names()
        if other != name
        for path in (catalogue.path_of(other), catalogue.card_path(other))
    )
    if (total := sum(others) + added) > catalogue.SIZE_LIMIT:
        raise UsageError(
            "the packaged models would be too large together",
            got=f"{total:,} bytes",
            expected=f"at most {catalogue.SIZE_LIMIT:,}",
            fix="--codec t5 --rest bf16, a smaller model, or remove another",
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(
            "cannot read the card's text", got=error, where=path, fix="check --text"
        ) from error


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="run folder or ckpt.pt")
    parser.add_argument("name")
    parser.add_argument("--eval", type=Path, required=True, help="result of terdit eval-fid --json")
    for word in ("data", "licence", "limits"):
        parser.add_argument(f"--{word}", help="one line; needed for a new card")
    parser.add_argument("--text", type=Path, help="Markdown file, the text of the card")
    parser.add_argument("--codec", choices=("t2", "t5"), default="t5")
    parser.add_argument("--rest", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    try:
        text = None if options.text is None else _read_text(options.text)
        words = Words(options.data, options.licence, options.limits, text)
        target = run(options.run, options.name, options.eval, words, options.codec, options.rest)
    except TerditError as error:
        console.fail(str(error))
        sys.exit(error.exit_code)
    console.result(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
