"""Images from Python: `load_pipeline(name_or_path).generate(classes=[...])`.

>>> import terdit_cli
>>> pipe = terdit_cli.load_pipeline("fashion-mnist")
>>> images = pipe.generate(classes=["Sneaker", 9], n=4, seed=0)
>>> images[0].save("sneaker.png")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from terdit_cli.class_names import find_class, find_classes
from terdit_cli.errors import UsageError
from terdit_cli.generate.generator import ImageGenerator, open_generator, sampler_for
from terdit_cli.generate.options import ModelOptions, SamplingOptions
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.model.dit import DiT
from terdit_cli.model.metadata import ModelInfo


@dataclass(frozen=True)
class Pipeline:
    """A loaded model that generates PIL images."""

    generator: ImageGenerator

    @property
    def network(self) -> DiT:
        """The network f(x, t, y) -> [eps | variance]."""
        return self.generator.model.network

    @property
    def info(self) -> ModelInfo:
        """The model's metadata: configuration, image size, training step."""
        return self.generator.model.info

    @property
    def classes(self) -> list[str]:
        """The name of each class, by its id."""
        return [names[0] for names in self.generator.class_names]

    def generate(
        self,
        classes: int | str | Sequence[int | str] = "all",
        n: int = 1,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        cfg_scale: float | None = None,
        cfg_channels: Literal["3", "all"] = "3",
        eps_scale: float | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> list[Image.Image]:
        """Generate `n` images of each class, those of the first class first.

        The images are those of `terdit sample` with the same options: image j of a class depends on
        the seed, the class and j alone.

        Args:
            classes: ids (int) or what `--prompt-class` takes (str): names, "3,7,9", "all".
            n: images per class.
            steps, sampler, cfg_scale, eps_scale: None: the setting of a packaged model's card,
                else that of the published sampler.
            batch_size: images per batch; None: 8, or what fits the GPU.

        Raises:
            UsageError: an unknown class, or impossible values.
        """
        if n < 1:
            raise UsageError("wrong n", got=n, expected="a positive number")
        options = SamplingOptions(
            steps, sampler, cfg_scale, cfg_channels, eps_scale, seed, batch_size
        )
        config = self.generator.fit(sampler_for(self.generator.file, options))
        names = self.generator.class_names
        each = [classes] if isinstance(classes, int | str) else list(classes)
        ids = [found for one in each for found in self._ids(one)]
        indices = [copy * len(names) + class_id for class_id in ids for copy in range(n)]
        size = self.generator.batch_size(batch_size, config.guided)
        batches = self.generator.images(indices, config, seed, size)
        return [Image.fromarray(image) for images, _ in batches for image in images]

    def _ids(self, query: int | str) -> list[int]:
        names = self.generator.class_names
        if isinstance(query, str):
            return find_classes(query, names)
        return [find_class(str(query), [[str(index)] for index in range(len(names))])]


def load_pipeline(
    name_or_path: str | os.PathLike[str],
    device: str | None = None,
    *,
    backend: str = "auto",
    activations: str = "auto",
    compiled: bool = False,
    ema: bool = True,
    threads: int | None = None,
    vae: str | None = None,
) -> Pipeline:
    """Open a model for generating images.

    Args:
        name_or_path: the name of a packaged model, a .tdt, a ternarized .safetensors, a run folder,
            a ckpt.pt or a released TerDiT folder.
        device: "cpu", "cuda", "cuda:1"; None: a GPU if there is one.
        backend, activations: of packed models.
        compiled: compile a checkpoint's network.
        ema: a checkpoint's EMA weights, or those of the last step.
        threads: CPU threads of this process from now on; None: unchanged.
        vae: VAE folder or hub id to use instead of the model's.

    Raises:
        InputFileError, UsageError, EnvironmentProblem: as `terdit sample`.
    """
    options = ModelOptions(backend, activations, compiled, ema, threads, device, vae)
    return Pipeline(open_generator(ModelFile.open(name_or_path), options))
