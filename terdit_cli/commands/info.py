"""`terdit info`: what is in a file or folder that terdit reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from terdit_cli.class_names import names_of_classes
from terdit_cli.data.image_sources import find_images, open_image_set
from terdit_cli.data.latent_shards import INDEX, read_index
from terdit_cli.errors import InputFileError
from terdit_cli.evaluate.reference_set import is_statistics_file, load_reference
from terdit_cli.evaluate.result import load_result
from terdit_cli.generate.image_output import read_grid
from terdit_cli.hub import catalogue
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.model.metadata import ModelInfo
from terdit_cli.pack.tdt import TdtFile
from terdit_cli.recipe import find_recipe, load_recipe, shipped_recipes
from terdit_cli.system.atomic import file_sha256

_MODELS = (".tdt", ".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class FileInfo:
    """What a path is, and what it says of itself."""

    path: Path
    kind: str
    facts: dict[str, Any]
    classes: list[str] = field(default_factory=list)


def run(what: str) -> FileInfo:
    """Look at a file or folder, without reading all of it.

    Args:
        what: a path, or the name of a packaged model or of a shipped recipe.

    Raises:
        InputFileError: nothing there, damaged, or nothing that terdit reads.
    """
    path = Path(what)
    return next(look for applies, look in _KINDS if applies(path, what))(path, what)


def _model(path: Path, what: str) -> FileInfo:
    file = ModelFile.open(what)
    info: ModelInfo
    facts: dict[str, Any]
    if file.kind == "checkpoint":
        checkpoint = file.checkpoint()
        info = checkpoint.info
        facts = {"parameters": sum(value.numel() for value in checkpoint.model.values())}
    elif file.kind == "release":
        with file.exported() as model:
            info, facts = model.info, {"ternary_matrices": len(model.ternary_names())}
    else:
        packed = TdtFile(file.path)
        with packed:
            info = packed.info
            names = packed.ternary_names()
            weights = sum(rows * columns for rows, columns in map(packed.matrix_shape, names))
            codecs = Counter(packed.codec(name) for name in names)
            facts = {"ternary_weights": weights, "codec": dict(codecs)}
    names = [group[0] for group in names_of_classes(info.class_names, info.config.num_classes)]
    card = file.card
    facts = {
        "bytes": file.weights_file.stat().st_size,
        "sha256": file.sha256,
        **facts,
        "network": {k: v for k, v in vars(info.config).items() if v is not None},
        "ternary": vars(info.ternary),
        "space": info.space.kind if info.space.vae is None else info.space.vae,
        "image_size": info.image_size,
        "diffusion": info.diffusion,
        "weights": info.weights,
        "step": info.step,
        "recipe_sha256": info.recipe_sha256,
        "written_by": f"terdit {info.tool_version}",
        **({} if card is None else {"data": card.data, "licence": card.licence}),
    }
    kinds = {"checkpoint": "training checkpoint", "release": "TerDiT release"}
    kind = kinds.get(file.kind, "packed model" if file.path.suffix == ".tdt" else "ternary weights")
    return FileInfo(file.path, kind, facts, names)


def _recipe(path: Path, what: str) -> FileInfo:
    file = find_recipe(path)
    recipe = load_recipe(file)
    return FileInfo(file, "recipe", {"sha256": recipe.sha256(), **recipe.model_dump(mode="json")})


def _result(path: Path, what: str) -> FileInfo:
    result = load_result(path)
    facts = {
        **result.metrics,
        "n": result.n,
        "n_reference": result.n_reference,
        "pipeline": result.pipeline,
        "gates": {gate.name: gate.passed for gate in result.gates},
        **{key: result.provenance.get(key) for key in ("model", "images", "date", "command")},
    }
    return FileInfo(path, "result of eval-fid", facts, list(result.per_class))


def _reference(path: Path, what: str) -> FileInfo:
    reference = load_reference(path)
    facts = {
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "features": len(reference.mean),
        "images": reference.count,
        "pipeline": reference.pipeline,
        "spatial": reference.spatial_mean is not None,
        "features_kept": 0 if reference.features is None else len(reference.features),
        "images_sha256": reference.images_sha256,
    }
    return FileInfo(path, "reference statistics", facts)


def _latents(path: Path, what: str) -> FileInfo:
    index = read_index(path)
    facts = {
        "images": index.images,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "image_size": index.image_size,
        "latent_shape": index.latent_shape,
        "mirrored": index.mirrored,
        "vae": index.vae,
        "scale_factor": index.scale_factor,
    }
    return FileInfo(path, "prepared latents", facts, index.class_names)


def _grid(path: Path, what: str) -> FileInfo:
    return FileInfo(path, "images of terdit sample", dict(read_grid(path) or {}))


def _images(path: Path, what: str) -> FileInfo:
    images = open_image_set(what)
    pixels, mode = images.read(0)
    facts = {
        "images": len(images),
        "first": f"{images.names[0]}: {pixels.shape[1]} x {pixels.shape[0]}, {mode}",
        "left_out": dict(images.left_out),
    }
    return FileInfo(path, "images", facts, images.class_names)


def _is_model(path: Path, what: str) -> bool:
    if path.suffix.lower() in _MODELS or (not path.exists() and what in catalogue.names()):
        return True
    return any(found for part in catalogue.OF_A_MODEL for found in path.glob(part))


def _is_recipe(path: Path, what: str) -> bool:
    is_name = not path.exists() and what in shipped_recipes()
    return is_name or path.suffix.lower() in (".yaml", ".yml")


def _is_latents(path: Path, what: str) -> bool:
    index = path / INDEX
    return index.is_file() and "latent_shape" in _first(index)


def _first(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(1 << 16)


def _is_grid(path: Path, what: str) -> bool:
    return path.suffix.lower() == ".png" and read_grid(path) is not None


def _is_result(path: Path, what: str) -> bool:
    return path.suffix.lower() == ".json"


def _is_images(path: Path, what: str) -> bool:
    find_images(what)
    if path.suffix.lower() == ".png":
        raise InputFileError(
            "not a file that terdit reads", got="an image of another program", where=path,
            expected="a model, recipe, result, reference, or a set of images",
            fix="give the folder of the image",
        )  # fmt: skip
    return True


# In this order: what a path is -> how to look at it.
_KINDS: tuple[tuple[Callable[[Path, str], bool], Callable[[Path, str], FileInfo]], ...] = (
    (_is_model, _model),
    (_is_recipe, _recipe),
    (_is_result, _result),
    (lambda path, what: is_statistics_file(path), _reference),
    (_is_latents, _latents),
    (_is_grid, _grid),
    (_is_images, _images),
)


def as_json(found: FileInfo) -> dict[str, Any]:
    """Return plain JSON types."""
    values = {"path": str(found.path), "kind": found.kind, **found.facts}
    if found.classes:
        values["classes"] = found.classes
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain
