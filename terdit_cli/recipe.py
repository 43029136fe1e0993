"""The recipe: one YAML file says everything that changes the result of a run.

Strict: an unknown key, a wrong type or an impossible value is an error, and all errors come at
once, each with its dotted path and the nearest valid key. `key=value` words override. The
resolved recipe (defaults + file + overrides) is what is hashed and written beside every result.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from terdit_cli.errors import UsageError
from terdit_cli.strict_yaml import Section, mistakes, parse_yaml, read_mapping

_PACKAGE = Path(__file__).parent
_ROOTS = (_PACKAGE, _PACKAGE.parent)  # installed, or a checkout

VAE_DOWNSAMPLE = 8  # of Stable Diffusion's VAE, which all published recipes use
VAE_CHANNELS = 4

Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


def find_recipe(path: Path) -> Path:
    """Return `path`, or the shipped file of that name where nothing of the user's is there."""
    if path.parts[:1] != ("recipes",) or path.exists():
        return path
    return next((root / path for root in _ROOTS if (root / path).is_file()), path)


def _at_home(path: Path) -> Path:
    """Return a path with its ~ replaced, as a shell does not in the word data.path=~/images."""
    with suppress(RuntimeError):  # a user without a home
        path = path.expanduser()
    return path


UserPath = Annotated[Path, AfterValidator(_at_home)]
DataSource = Literal[
    "embedded", "folder", "zip", "tars", "parquet", "cifar10", "fashion-mnist", "latents"
]


class ModelSection(Section):
    """The network; `size` gives dim, n_layers and n_heads unless they are given here."""

    size: str = "600m"
    dim: PositiveInt | None = None
    n_layers: PositiveInt | None = None
    n_heads: PositiveInt | None = None
    n_kv_heads: PositiveInt | None = None
    patch_size: PositiveInt = 2
    multiple_of: PositiveInt = 256
    ffn_dim_multiplier: PositiveFloat | None = None
    norm_eps: PositiveFloat = 1e-5
    class_dropout_prob: Annotated[float, Field(ge=0, lt=1)] = 0.1
    num_classes: PositiveInt = 1000
    learn_sigma: bool = True
    qk_norm: bool = True
    pos_embed: bool = False  # DiT's fixed embedding of positions, besides rotary attention


# Sets of fields of `ternary`; those that a set does not name have their defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "best": {},
    "paper": {
        "scale": "learned",
        "alpha_init": "randn",
        "adaln_norm": True,
        "granularity": "tensor",
        "activations": "none",
        "ste": "scaled",
        "ste_clip": None,
    },
}


class TernarySection(Section):
    """The quantiser; see the README for what each option does to training."""

    # The published TerDiT's fields below, or the defaults. Fields given beside it win; a word
    # ternary.preset=NAME comes after the file and replaces them. A resolved recipe has no preset
    # any more: it spells the fields out.
    preset: Annotated[Literal["best", "paper"] | None, Field(exclude=True)] = None
    enabled: bool = True
    scale: Literal["learned", "absmean"] = "learned"
    alpha_init: Literal["randn", "absmean"] = "absmean"
    adaln_norm: bool | None = None  # None: as `enabled` (the full-precision parent has none)
    granularity: Literal["tensor", "row", "group128"] = "row"
    activations: Literal["none", "int8"] = "none"
    # What masters get of the effective weight's gradient: alpha times it, or its sign of alpha.
    ste: Literal["scaled", "identity"] = "scaled"
    ste_clip: PositiveFloat | None = None  # gammas; masters beyond get no gradient. None: all do

    @model_validator(mode="before")
    @classmethod
    def _spell_out_preset(cls, values: Any) -> Any:
        """Put a preset's fields in its place; unknown presets are left to the field's check."""
        if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
            return values
        fields = PRESETS.get(values["preset"])
        if fields is None:
            return values
        return fields | {key: value for key, value in values.items() if key != "preset"}

    def said(self) -> dict[str, Any]:
        """Return the fields that say something of the network: full precision has no quantiser."""
        if self.enabled:
            return self.model_dump(mode="json")
        return {"enabled": False, "adaln_norm": bool(self.adaln_norm)}


class DataSection(Section):
    """Images and the space the diffusion runs in."""

    source: DataSource = "embedded"
    path: UserPath | None = None
    split: str | None = None
    image_size: PositiveInt = 256  # pixels
    channels: Literal[1, 3] = 3  # of pixel-space models; 1 = grey
    vae: str | None = None  # folder or hub id; None: pixel space
    scale_factor: PositiveFloat = 0.18215
    flip: bool = True
    on_bad_image: Literal["error", "skip"] = "error"
    workers: NonNegativeInt = 4  # decoding threads

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if self.source != "embedded" and self.path is None:
            raise ValueError(f"data.path is needed for source {self.source!r}")
        if self.source == "latents" and self.vae is None:
            raise ValueError("data.vae is needed for source 'latents': the VAE that prepared them")
        if self.source == "latents" and self.split is not None:
            raise ValueError("data.split is chosen when latents are prepared: set data.split=null")
        if self.vae is not None and self.image_size % VAE_DOWNSAMPLE:
            raise ValueError(
                f"data.image_size {self.image_size} must be a multiple of {VAE_DOWNSAMPLE}, "
                "the VAE's downsampling"
            )
        return self


class TrainSection(Section):
    """Steps, batches and arithmetic."""

    init_from: UserPath | None = None  # ckpt.pt whose weights a new run begins with; None: random
    steps: PositiveInt = 400_000
    global_batch_size: PositiveInt = 256  # images an optimizer step
    micro_batch_size: PositiveInt = 32  # images a forward pass of one process
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    activation_checkpointing: bool | PositiveInt = False  # every block, or every k-th
    max_skipped: NonNegativeInt = 10  # steps in a row without finite gradients; one more stops

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size {self.global_batch_size} must be a multiple of "
                f"train.micro_batch_size {self.micro_batch_size}"
            )
        return self


class DistillSection(Section):
    """A trained model whose predictions are learned beside the noise itself."""

    teacher: UserPath | None = None  # ckpt.pt or run folder; None: no distillation
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5  # of the teacher; the noise has the rest
    schedule: Literal["constant", "linear"] = "constant"  # linear: weight falls to 0 at the end
    features: NonNegativeFloat = 0.0  # of the relative difference of the last blocks' outputs

    @model_validator(mode="after")
    def _check(self) -> DistillSection:
        if self.features and self.teacher is None:
            raise ValueError("distill.features needs distill.teacher: whose features are to be met")
        return self


class ParallelSection(Section):
    """How several processes share the work; one process alone takes no notice of it."""

    mode: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    shard_size: PositiveInt | None = None  # hsdp: processes that share one copy; None: a node's
    reshard_after_forward: bool = True  # fsdp, hsdp: free a block's gathered weights in between
    reduce: Literal["fp32", "bf16"] = "fp32"  # arithmetic of the gradients' sum over processes
    cpu_offload: bool = False  # fsdp, hsdp on GPUs: masters and moments in the host's memory
    hang_seconds: PositiveFloat = 600  # without a step on any process: the job is ended

    @model_validator(mode="after")
    def _check(self) -> ParallelSection:
        if self.shard_size is not None and self.mode != "hsdp":
            raise ValueError(f"parallel.shard_size needs parallel.mode=hsdp, not {self.mode!r}")
        if self.cpu_offload and self.mode == "ddp":
            raise ValueError("parallel.cpu_offload needs parallel.mode=fsdp or hsdp")
        return self


class OptimSection(Section):
    """The optimizer and its learning-rate schedule."""

    # adamw8bit: moments of a byte each, by torchao. muon: the blocks' matrices by Muon.
    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: PositiveFloat = 1e-4
    alpha_lr_ratio: PositiveFloat = 1.0  # the learned alphas' rate / lr
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    decayed: Literal["matrices", "blocks"] = "matrices"  # blocks: the blocks' matrices only
    grad_clip: PositiveFloat | None = 2.0  # L2 norm of all gradients; None: off
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "cosine", "step"] = "constant"
    final_lr_ratio: Fraction = 0.0  # cosine: last lr / lr
    drop_at: tuple[Fraction, ...] = (0.7,)  # step: shares of the run after which lr drops
    drop_factor: Annotated[float, Field(gt=0, le=1)] = 0.2


class EmaSection(Section):
    """The averaged copy that previews, ternarize and pack use."""

    decay: Fraction = 0.9999
    warmup: bool = False


class SampleSection(Section):
    """Preview grids drawn from the EMA weights during training."""

    every: NonNegativeInt = 5_000  # steps; 0: none
    count: PositiveInt = 16  # images; image i has class i mod num_classes
    sampler: Literal["ddpm", "ddim", "dpmpp-2m", "unipc", "euler"] = "dpmpp-2m"
    steps: PositiveInt = 20
    cfg_scale: NonNegativeFloat = 4.0


class WandbSection(Section):
    """Where Weights & Biases keeps the run."""

    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]
    entity: str | None = None  # a user or team; None: the default of the account
    mode: Literal["online", "offline"] = "online"


class LoggingSection(Section):
    """metrics.jsonl and loss.png always; TensorBoard and Weights & Biases where wanted."""

    every: PositiveInt = 100  # steps
    tensorboard: bool = False  # also into RUN/tensorboard
    wandb: WandbSection | None = None


class CheckpointSection(Section):
    """Resumable checkpoints."""

    every: PositiveInt = 10_000  # steps
    keep_last: PositiveInt = 2
    keep_every_hours: PositiveFloat | None = None  # one of so many hours is never deleted


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: NonNegativeInt = 0
    model: ModelSection = ModelSection()
    ternary: TernarySection = TernarySection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    distill: DistillSection = DistillSection()
    parallel: ParallelSection = ParallelSection()
    optim: OptimSection = OptimSection()
    ema: EmaSection = EmaSection()
    sample: SampleSection = SampleSection()
    logging: LoggingSection = LoggingSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.input_size % self.model.patch_size:
            pixels = self.model.patch_size * (VAE_DOWNSAMPLE if self.data.vae is not None else 1)
            raise ValueError(
                f"data.image_size {self.data.image_size} must be a multiple of {pixels}, the "
                f"pixels that model.patch_size {self.model.patch_size} spans"
            )
        if self.parallel.cpu_offload and self.ternary.enabled:  # see train/ternary_cache.py
            raise ValueError("parallel.cpu_offload needs ternary.enabled=false: trits stay on GPUs")
        return self

    @property
    def in_channels(self) -> int:
        return VAE_CHANNELS if self.data.vae is not None else self.data.channels

    @property
    def input_size(self) -> int:
        """Side of the latents (or pixels) the network sees."""
        return self.data.image_size // (VAE_DOWNSAMPLE if self.data.vae is not None else 1)

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def sha256(self) -> str:
        """Return the hash of the resolved recipe (independent of layout and comments)."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe, the user's or one that is shipped.

    Raises:
        InputFileError: the file is missing or not YAML.
        UsageError: one sentence for each unknown key, wrong type or impossible value.
    """
    path = find_recipe(path)
    values = read_mapping(path, "recipe")
    # A preset takes the place of what the file says; fields beside it win, on either side of it.
    for word in sorted(overrides, key=lambda word: not word.startswith("ternary.preset=")):
        _apply_override(values, word)
    return parse_recipe(values, where=path)


def parse_recipe(values: Any, where: object) -> Recipe:
    """Check plain values (as from YAML); raises UsageError listing every mistake."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        fix = "correct the recipe or pass key=value words"
        raise mistakes(error, Recipe, "recipe", where, fix) from error


def _apply_override(values: dict[str, Any], word: str) -> None:
    """Set `a.b=value` in nested dictionaries; the value is parsed as YAML."""
    key, separator, text = word.partition("=")
    if not separator or not key:
        raise UsageError(
            "an override is not key=value", got=repr(word), fix="write it as optim.lr=2e-4"
        )
    try:
        value = parse_yaml(text)
        if re.match(r"[^'\"]*\s#", text):
            raise ValueError("what follows ' #' would be a comment")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(
            "an override's value is not valid YAML", got=repr(word[:200]),
            fix="quote it, as in 'data.path=\"a: b\"'",
        ) from error  # fmt: skip
    *sections, last = key.split(".")
    for section in sections:
        if values.get(section) is None:  # also a section that the file leaves empty
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise UsageError(
                "an override names a field inside a plain value", got=repr(word),
                fix=f"{section} has no fields",
            )  # fmt: skip
    if key == "ternary.preset":  # said after the file, so instead of what the file says
        for name in PRESETS["paper"]:
            values.pop(name, None)
    values[last] = value
