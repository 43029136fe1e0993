"""The command line of `terdit prepare`; no torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from terdit_cli import console
from terdit_cli.cli.flags import Json
from terdit_cli.errors import UsageError

EXAMPLES = (
    "terdit prepare recipes/600m.yaml data.path=/path/to/imagenet/train -o latents/imagenet256",
    "torchrun --nproc-per-node 8 -m terdit_cli prepare recipes/600m.yaml -o latents/imagenet256",
    "terdit prepare --verify latents/imagenet256",
    "terdit train recipes/600m.yaml data.source=latents data.path=latents/imagenet256",
)


def prepare(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys to override.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder of latents.  [default: latents/<name of the recipe>]"
        ),
    ] = None,
    shard_mb: Annotated[float, typer.Option(help="Target shard size (MB).")] = 256,
    batch_size: Annotated[
        int, typer.Option(help="Images per batch; mirror images come in addition.")
    ] = 16,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda or cuda:1.  [default: a GPU if there is one]"),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Only verify the shards of a finished folder."),
    ] = None,
    json: Json = False,
) -> None:
    """Encode a recipe's images with its VAE into latents on disk.

    Any run can train on them. Rerun to resume; missing shards are regenerated.
    """
    if (recipe is None) == (verify is None):
        raise UsageError(
            "prepare needs a recipe, or --verify with a folder",
            got="both" if recipe is not None else "neither",
            fix="terdit prepare RECIPE -o FOLDER, or terdit prepare --verify FOLDER",
        )
    if recipe is not None:  # its mistakes show before torch is imported
        from terdit_cli.recipe import load_recipe

        load_recipe(recipe, overrides or [])
    from terdit_cli.commands import prepare as command

    if verify is not None:
        checked = command.verify(verify)
        if json:
            console.result_json(dataclasses.asdict(checked))
            return
        console.result(
            f"{verify}: {checked.shards} shards are intact, {checked.images:,} images, "
            f"{console.byte_size(checked.bytes)} in {console.duration(checked.seconds)}"
        )
        return
    assert recipe is not None
    result = command.run(recipe, overrides or (), out, shard_mb, batch_size, device)
    if json:
        console.result_json(dataclasses.asdict(result))
        return
    skipped = f" ({result.skipped} unreadable ones left out)" if result.skipped else ""
    rate = "" if result.images_per_second is None else f", {result.images_per_second:.1f} images/s"
    console.result(
        f"{result.folder}: {result.images:,} images{skipped} in {result.shards} shards, "
        f"{console.byte_size(result.bytes)}{rate}"
    )
    console.note(f"to train on them: data.source=latents data.path={result.folder} data.split=null")
