"""Finding and loading a pretrained autoencoder: a folder, one file, the hub's cache, the hub.

Folders are taken as people have them: a VAE's, or a whole pipeline's (its `vae/`); weights as
.safetensors, in half precision only (`.fp16`), in shards with an index, or as .bin. A single
.safetensors file may have diffusers' names of tensors or the original ones (first_stage_model).
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from terdit_cli.errors import EnvironmentProblem, InputFileError
from terdit_cli.system.torchvision_shim import import_vision

VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
# What the system says where a download cannot be kept.
_NOT_KEPT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_WEIGHTS = "diffusion_pytorch_model"
_MAX_CONFIG_BYTES = 1 << 20  # of an index too
_ONE_TRY = 5.0  # seconds for the hub to answer
# The files of a VAE in a repository of one, or of a whole pipeline.
_PATTERNS = [
    f"{folder}{name}" for folder in ("", "vae/") for name in ("config.json", f"{_WEIGHTS}*")
]
# Stable Diffusion 1's autoencoder, which the files without a config are.
_STABLE_DIFFUSION = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


def load_autoencoder(vae: str) -> Any:
    """Load an autoencoder from a folder or file, else from the hub's cache, else from the hub.

    Raises:
        InputFileError: missing, incomplete, corrupt, or of another model class.
        EnvironmentProblem: neither in the cache nor to be had from the hub.
    """
    place = Path(vae).expanduser()
    # Looked at before any library sees it, whose answer to a wrong path is "no connection".
    if place.is_dir():
        return _load_folder(place)
    if place.is_file():
        return _load_file(place)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", vae) or place.suffix in (".safetensors", ".bin"):
        raise InputFileError("VAE folder not found", where=place, fix="check the path")
    return _load_folder(_download(vae))


def _load_folder(folder: Path) -> Any:
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"  # of a whole pipeline
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise InputFileError(
            "no VAE here",
            got="no config.json",
            expected="a folder in diffusers' format: config.json and the weights",
            where=folder,
            fix="give the folder that holds the VAE's config.json, or one .safetensors file",
        )
    model_class = _model_class(_read_json(config_path), config_path)
    variant, kind = _weights(folder)
    # diffusers reads .bin files with weights_only=True.
    model, info = _guarded(
        folder,
        lambda: model_class.from_pretrained(
            folder,
            variant=variant,
            use_safetensors=kind == "safetensors",
            output_loading_info=True,
            low_cpu_mem_usage=False,
        ),
    )
    # diffusers leaves what the file lacks at random values.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise _corrupt(folder, f"no values for {len(missing)} tensors, first {missing[0]}")
    return model.float()


def _weights(folder: Path) -> tuple[str | None, str]:
    """Return the variant and the kind of a folder's weights: full precision and no code first.

    Raises:
        InputFileError: there are none, or the index of their shards leads out of the folder.
    """
    pattern = rf"{_WEIGHTS}(?:\.(?P<variant>[A-Za-z]\w*?))?\.(?P<kind>safetensors|bin)"
    choices = {}
    for path in sorted(folder.iterdir()):
        stem = path.name.removesuffix(".index.json")
        # The index of a variant's shards: model.safetensors.index.fp16.json
        if indexed := re.fullmatch(r"(.*)\.index(\.\w+)?\.json", path.name):
            name, _, end = indexed[1].rpartition(".")
            stem = f"{name}{indexed[2] or ''}.{end}"
        if found := re.fullmatch(pattern, stem):
            choices[found["kind"] != "safetensors", found["variant"] or ""] = path
    if not choices:
        raise InputFileError(
            "the VAE has no weights",
            expected=f"{_WEIGHTS}.safetensors or {_WEIGHTS}.bin",
            where=folder,
            fix="copy or download the folder again",
        )
    (is_bin, variant), path = min(choices.items())
    if path.suffix == ".json":
        shards = _read_json(path).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {None}
        for name in names:
            if (
                not isinstance(name, str)
                or Path(name).name != name
                or not (folder / name).is_file()
            ):
                raise _corrupt(path, f"a shard {name!r}, which is no file of the folder")
    return variant or None, "bin" if is_bin else "safetensors"


def _load_file(path: Path) -> Any:
    if path.suffix.lower() != ".safetensors":
        raise InputFileError(
            "not a VAE", got=path.name, expected="a folder in diffusers' format, or .safetensors",
            where=path, fix="convert it: other formats can hold code",
        )  # fmt: skip
    beside = path.parent / "config.json"
    config = _read_json(beside) if beside.is_file() else _STABLE_DIFFUSION
    if config.get("_class_name") not in VAE_CLASSES:  # of something else in the same folder
        config = _STABLE_DIFFUSION
    model_class = _model_class(config, path)
    with tempfile.TemporaryDirectory(prefix="terdit-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        model = _guarded(
            path,
            lambda: model_class.from_single_file(
                os.fspath(path), config=folder, local_files_only=True
            ),
        )
    empty = [name for name, value in model.state_dict().items() if value.is_meta]
    if empty:
        raise _corrupt(path, f"no values for {len(empty)} tensors, first {empty[0]}")
    return model.float()


def _guarded(where: Path, load: Callable[[], Any]) -> Any:
    """Return what `load` loads; what a library raises on damaged files becomes InputFileError."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        return load()
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        RuntimeError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise _corrupt(where, (str(error) or type(error).__name__).splitlines()[0]) from error


def _download(vae: str) -> Path:
    """Return the folder of a model of the hub: the cache first, then one short try to get it."""
    import_vision("diffusers")
    import huggingface_hub

    get = partial(
        huggingface_hub.snapshot_download,
        vae,
        allow_patterns=_PATTERNS,
        etag_timeout=_ONE_TRY,
    )
    try:
        with suppress(FileNotFoundError):  # not in the cache
            if _is_whole(cached := Path(get(local_files_only=True))):
                return cached
        return Path(get(local_files_only=False))
    except (OSError, ValueError) as error:
        if refusal := _refusal(error):
            raise EnvironmentProblem(
                "cannot keep the VAE", got=refusal.strerror, where=refusal.filename or vae,
                fix="set HF_HOME to a folder with room that can be written to",
            ) from error  # fmt: skip
        raise EnvironmentProblem(
            "cannot get the VAE",
            # Not the library's reason: without a network it says that the model lacks a file.
            got="no such folder here, and no such model from the hub or its cache",
            expected="a folder, or a model id of the Hugging Face hub and a network",
            where=vae,
            fix=f"hf download {vae} --local-dir VAE where there is a network; then give its folder "
            "(sample and eval-fid --vae VAE, a recipe data.vae=VAE)",
        ) from error


def _is_whole(folder: Path) -> bool:
    """Say whether a cached download has a config and weights."""
    folders = (folder, folder / "vae")
    return any((at / "config.json").is_file() and any(at.glob(f"{_WEIGHTS}*")) for at in folders)


def _refusal(error: BaseException | None) -> OSError | None:
    """Return what the system refused, behind the library's own errors; None if nothing."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NOT_KEPT:
            return error
        error = error.__cause__ or error.__context__
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputFileError(
            "cannot read the VAE's config",
            got=str(error),
            expected="a JSON object",
            where=path,
            fix="copy or download the folder again",
        ) from error
    return content


def _model_class(config: dict[str, Any], where: object) -> Any:
    name = config.get("_class_name")
    if name not in VAE_CLASSES:
        raise InputFileError(
            "not a supported VAE",
            got=f"_class_name {name!r}",
            expected=" or ".join(VAE_CLASSES),
            where=where,
            fix="give the folder or id of such a model",
        )
    return getattr(import_vision("diffusers"), name)


def _corrupt(where: Path, got: str) -> InputFileError:
    return InputFileError(
        "cannot load the VAE",
        got=got,
        expected="weights that fit its config.json",
        where=where,
        fix="copy or download it again",
    )
