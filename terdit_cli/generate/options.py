"""The options of sampling and of loading a model, each declared once; no torch here.

The command line makes its flags from these fields (`cli/flags.py`), the verbs pass the objects on,
and the generator reads them. A new option is a field here and its use in the generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from terdit_cli.option import option

Labels = Literal["balanced", "uniform"]
Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class SamplingOptions:
    """How images are sampled. None: the value on the card of a packaged model, else a default."""

    GROUP: ClassVar[str] = "Sampling"

    steps: int | None = option(None, "Sampling steps.  [default: 250, or the model card's]")
    sampler: str | None = option(
        None,
        "ddpm, ddim, dpmpp-2m, unipc or euler.  [default: ddpm, or the model card's]",
    )
    cfg_scale: float | None = option(
        None,
        "Scale of classifier-free guidance (CFG); 1 disables.  [default: 4, or the model card's]",
    )
    cfg_channels: Literal["3", "all"] = option(
        "3", "Channels that CFG is applied to: the first 3, as published, or all."
    )
    eps_scale: float | None = option(
        None, "Factor on the predicted noise.  [default: 1, or the model card's]"
    )
    seed: int = option(0, "Random seed.")
    batch_size: int | None = option(
        None,
        "Images per batch; CFG uses two rows per image.  [default: 8, or what fits the GPU]",
    )


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded and run."""

    GROUP: ClassVar[str] = "Model"

    backend: str = option("auto", "auto, gpu, cpu or reference.")
    activations: str = option(
        "auto",
        "Precision of activations in packed models: auto, int8, int16, bf16, fp32 or fp8.",
    )
    compiled: bool = option(
        False, "Compile a checkpoint's network; pays off for thousands of images.", "--compile"
    )
    ema: bool = option(
        True, "Use a checkpoint's EMA weights, or those of its last step.", "--ema/--raw"
    )
    threads: int | None = option(None, "CPU threads.  [default: torch's]", envvar="TERDIT_THREADS")
    device: str | None = option(
        None, "auto, cpu, cuda or cuda:1.  [default: a GPU if there is one]"
    )
    vae: str | None = option(None, "VAE folder or hub id to use instead of the model's.")

    @property
    def weights(self) -> Weights:
        return "ema" if self.ema else "raw"
