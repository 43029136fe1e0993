"""Pixel space and VAE space: exact round trips, scales, noise, and folders that are no VAE."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from terdit_cli.data import vae_files
from terdit_cli.data.vae import PixelSpace, VaeSpace
from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.system.torchvision_shim import import_vision

SCALE = 0.18215


def make_vae(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    diffusers = import_vision("diffusers")
    if kind == "AutoencoderKL":
        arguments: dict[str, Any] = {
            "block_out_channels": (8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "norm_num_groups": 4,
            "layers_per_block": 1,
        }
        return diffusers.AutoencoderKL(**(arguments | changes))
    arguments = {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
    }
    return diffusers.AutoencoderTiny(**(arguments | changes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vae")
    for kind in ("AutoencoderKL", "AutoencoderTiny"):
        make_vae(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in ("AutoencoderKL", "AutoencoderTiny")}


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def noise(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_back_exactly(channels: int) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 8, 32, 1).expand(2, -1, -1, 3)
    space = PixelSpace(channels)  # type: ignore[arg-type]
    latents = space.encode(levels)
    assert latents.shape == (2, channels, 8, 32)
    assert latents.dtype == torch.float32
    assert latents.min() == -1
    assert latents.max() == 1
    assert torch.equal(space.decode(latents), levels)
    assert space.latent_shape(28) == (channels, 28, 28)
    assert space.downsample == 1


def test_grey_is_pillows() -> None:
    """Equal channels come back as they were: what grey images give."""
    images = noise(2, 5, 7, 3)
    images[1] = images[1, ..., :1]
    back = PixelSpace(1).decode(PixelSpace(1).encode(images))
    grey = [np.array(Image.fromarray(image.numpy()).convert("L")) for image in images]
    for channel in range(3):
        assert torch.equal(back[..., channel], torch.from_numpy(np.stack(grey)))
    assert torch.equal(back[1], images[1])


def test_colour_axes() -> None:
    images = noise(2, 5, 7, 3)
    assert torch.equal(PixelSpace(3).encode(images)[1, 2], images[1, :, :, 2] / 127.5 - 1)


def test_decoding_clamps_and_truncates_like_upstream() -> None:
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, 1 / 255]).reshape(1, 1, 1, 6)
    # 127.5 x + 128 = 0.5 at -1, 128 at 0, 128.5 at 1/255, all cut to the integer below
    assert PixelSpace(1).decode(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 128]


def test_bad_channels() -> None:
    with pytest.raises(UsageError, match="got 4, expected 1 or 3"):
        PixelSpace(4)  # type: ignore[arg-type]


# --- VAEs -----------------------------------------------------------------------------------------


def test_kl_is_diffusers_posterior_times_scale(folders: dict[str, Path]) -> None:
    space = VaeSpace(str(folders["AutoencoderKL"]), SCALE)
    images = noise(2, 16, 24, 3)
    x = images.permute(0, 3, 1, 2) / 127.5 - 1
    theirs = make_vae("AutoencoderKL").eval()
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        sampled = posterior.sample(torch.Generator().manual_seed(7))
    drawn = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(7))
    ours = space.encode(images, drawn)
    assert ours.dtype == torch.float32
    assert ours.shape == (2, 4, 4, 6)
    torch.testing.assert_close(ours, sampled * SCALE, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(space.encode(images), posterior.mean * SCALE, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        decoded = theirs.decode(sampled).sample
    expected = (127.5 * decoded + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    pixels = space.decode(ours)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (2, 16, 24, 3)
    assert (pixels.int() - expected.int()).abs().max() <= 1  # (z * s) / s may miss z by an ulp
    assert space.scale_factor == SCALE
    assert space.downsample == 4
    assert space.latent_shape(32) == (4, 8, 8)


def test_tiny_is_deterministic_and_has_its_own_scale(folders: dict[str, Path]) -> None:
    space = VaeSpace(str(folders["AutoencoderTiny"]), SCALE)
    images = noise(1, 16, 16, 3)
    theirs = make_vae("AutoencoderTiny").eval()
    with torch.no_grad():
        latents = theirs.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latents
    assert space.scale_factor == 1.0
    assert space.downsample == 4
    torch.testing.assert_close(space.encode(images, torch.ones_like(latents)), latents)
    assert space.decode(latents).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_bf16_gives_float32_latents_and_no_gradients(kind: str, folders: dict[str, Path]) -> None:
    space = VaeSpace(str(folders[kind]), SCALE, "cpu", torch.bfloat16)
    latents = space.encode(noise(1, 16, 16, 3), torch.ones(1, 4, 4, 4))
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    assert space.decode(latents).dtype == torch.uint8


def test_torch_weights_load_without_code(folders: dict[str, Path], tmp_path: Path) -> None:
    make_vae("AutoencoderTiny").save_pretrained(tmp_path / "bin", safe_serialization=False)
    images = noise(1, 8, 8, 3)
    ours = VaeSpace(str(tmp_path / "bin"), 1.0).encode(images)
    torch.testing.assert_close(ours, VaeSpace(str(folders["AutoencoderTiny"]), 1.0).encode(images))

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"encoder": Bomb()}, tmp_path / "bin/diffusion_pytorch_model.bin")
    with pytest.raises(InputFileError, match="cannot load the VAE"):
        VaeSpace(str(tmp_path / "bin"), 1.0)
    (tmp_path / "bin/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputFileError, match="cannot load the VAE"):
        VaeSpace(str(tmp_path / "bin"), 1.0)
    assert not (tmp_path / "exploded").exists()


def test_image_size_that_does_not_divide(folders: dict[str, Path]) -> None:
    space = VaeSpace(str(folders["AutoencoderKL"]), SCALE)
    with pytest.raises(UsageError, match=r"got 30, expected a multiple of 4.*image_size to 28"):
        space.latent_shape(30)


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("no config", "no config.json"),
        ("broken config", "cannot read the VAE's config"),
        ("list config", "no JSON object"),
        ("large config", "bytes"),
        ("other class", "_class_name 'UNet2DModel', expected AutoencoderKL or AutoencoderTiny"),
        ("no weights", "expected diffusion_pytorch_model.safetensors"),
        ("cut weights", "cannot load the VAE"),
        ("other weights", "cannot load the VAE"),
        ("fewer weights", "no values for"),
        ("grey", "1 channels in"),
    ],
)
def test_broken_folders(damage: str, reason: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders["AutoencoderTiny"], tmp_path / "vae")
    config = folder / "config.json"
    values = json.loads(config.read_text())
    if damage == "no config":
        config.unlink()
    elif damage == "broken config":
        config.write_text("{")
    elif damage == "list config":
        config.write_text("[]")
    elif damage == "large config":
        config.write_text(" " * (vae_files._MAX_CONFIG_BYTES + 1))
    elif damage == "other class":
        config.write_text(json.dumps(values | {"_class_name": "UNet2DModel"}))
    elif damage == "no weights":
        (folder / WEIGHTS).unlink()
    elif damage == "cut weights":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500])
    elif damage == "other weights":
        config.write_text(json.dumps(values | {"latent_channels": 7}))
    elif damage == "fewer weights":
        config.write_text(json.dumps(values | {"num_encoder_blocks": [1, 1, 2]}))
    elif damage == "grey":
        make_vae("AutoencoderTiny", in_channels=1, out_channels=1).save_pretrained(folder)
    with pytest.raises(InputFileError) as caught:
        VaeSpace(str(folder), 1.0)
    message = str(caught.value)
    assert reason in message
    assert str(folder) in message
    assert "Fix: " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "path", ["/nowhere/vae", "./vae", "~/no/vae", "a/b/c", "vae", "runs/vae/", "x/y.safetensors"]
)
def test_missing_folder(path: str) -> None:
    with pytest.raises(
        InputFileError, match=r"VAE folder not found.*(vae|b/c|x/y).*Fix: check the path"
    ):
        VaeSpace(path, 1.0)


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import_vision("diffusers")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentProblem) as caught:
        VaeSpace("someone/no-such-vae", SCALE)
    message = str(caught.value)
    assert "someone/no-such-vae" in message
    assert "hf download someone/no-such-vae" in message
    assert "--vae" in message
    assert caught.value.exit_code == 4


def test_cached_model_needs_no_network(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import_vision("diffusers")
    import huggingface_hub

    calls = []

    def snapshot(name: str, *, local_files_only: bool, **_: Any) -> str:
        calls.append(local_files_only)
        if local_files_only:
            raise FileNotFoundError
        return str(folders["AutoencoderKL"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert VaeSpace("someone/vae", SCALE).channels == 4
    assert calls == [True, False]
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: str(folders["AutoencoderKL"])
    )
    assert VaeSpace("someone/vae", SCALE).channels == 4


# --- folders as people have them ------------------------------------------------------------------


def same(space: VaeSpace, folder: Path, tolerance: float = 0.0) -> None:
    images = noise(1, 16, 16, 3)
    expected = VaeSpace(str(folder), SCALE).encode(images)
    torch.testing.assert_close(space.encode(images), expected, rtol=tolerance, atol=tolerance)


def test_half_precision_only(folders: dict[str, Path], tmp_path: Path) -> None:
    make_vae("AutoencoderKL").half().save_pretrained(tmp_path / "vae", variant="fp16")
    assert [file.name for file in (tmp_path / "vae").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    space = VaeSpace(str(tmp_path / "vae"), SCALE)
    assert space.encode(noise(1, 16, 16, 3)).dtype == torch.float32
    same(space, folders["AutoencoderKL"], 2e-3)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_with_an_index(
    variant: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "vae"
    make_vae("AutoencoderKL").save_pretrained(folder, max_shard_size="20KB", variant=variant)
    assert len(list(folder.glob("*.safetensors"))) > 1
    same(VaeSpace(str(folder), SCALE), folders["AutoencoderKL"])
    index = next(folder.glob("*.index*.json"))
    values = json.loads(index.read_text())
    for name in ("../elsewhere.safetensors", "gone.safetensors", 7):
        values["weight_map"]["encoder.conv_in.weight"] = name
        index.write_text(json.dumps(values))
        with pytest.raises(InputFileError, match="which is no file of the folder"):
            VaeSpace(str(folder), SCALE)


def test_a_whole_pipeline(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    copy(folders["AutoencoderKL"], tmp_path / "pipeline" / "vae")
    same(VaeSpace(str(tmp_path / "pipeline"), SCALE), folders["AutoencoderKL"])


def test_one_file_beside_its_config(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders["AutoencoderKL"], tmp_path / "vae")
    same(VaeSpace(str(folder / WEIGHTS), SCALE), folders["AutoencoderKL"])
    with pytest.raises(InputFileError, match=r"not a VAE: got config\.json"):
        VaeSpace(str(folder / "config.json"), SCALE)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500])
    with pytest.raises(InputFileError, match="cannot load the VAE"):
        VaeSpace(str(folder / WEIGHTS), SCALE)


@pytest.mark.slow
def test_stable_diffusions_own_file(tmp_path: Path) -> None:
    """Names of tensors as in the original repository, no config: vae-ft-mse-840000's form."""
    from safetensors.torch import save_file

    config = {k: v for k, v in vae_files._STABLE_DIFFUSION.items() if not k.startswith("_")}
    torch.manual_seed(0)
    model = import_vision("diffusers").AutoencoderKL(**config)
    model.save_pretrained(tmp_path / "vae")
    save_file(original_names(model.state_dict()), tmp_path / "sd.safetensors")
    same(VaeSpace(str(tmp_path / "sd.safetensors"), SCALE), tmp_path / "vae")


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an autoencoder's tensors under the names of CompVis's repository."""
    found = {}
    for name, value in state.items():
        half, _, rest = name.partition(".")
        if half in ("quant_conv", "post_quant_conv"):
            found[name] = value
            continue
        parts = rest.split(".")
        if parts[0] in ("down_blocks", "up_blocks"):
            up = parts[0] == "up_blocks"
            level = 3 - int(parts[1]) if up else int(parts[1])
            if parts[2] == "resnets":
                tail = ".".join(parts[4:]).replace("conv_shortcut", "nin_shortcut")
                new = f"{'up' if up else 'down'}.{level}.block.{parts[3]}.{tail}"
            else:
                sampler = "upsample" if up else "downsample"
                new = f"{'up' if up else 'down'}.{level}.{sampler}.conv.{parts[-1]}"
        elif parts[0] == "mid_block" and parts[1] == "resnets":
            new = f"mid.block_{int(parts[2]) + 1}." + ".".join(parts[3:])
        elif parts[0] == "mid_block":
            renamed = {
                "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out",
            }  # fmt: skip
            new = f"mid.attn_1.{renamed[parts[3]]}.{parts[-1]}"
            if parts[3] != "group_norm" and value.ndim == 2:
                value = value[:, :, None, None]
        else:
            new = rest.replace("conv_norm_out", "norm_out")
        found[f"first_stage_model.{half}.{new}"] = value.contiguous()
    return {
        name if name.startswith("first") else f"first_stage_model.{name}": value
        for name, value in found.items()
    }
