"""The recipe: one YAML file with everything that changes the result of a run.

Strict: an unknown key, a wrong type or an impossible value is an error. All errors are reported at
once, each with its dotted path and the nearest valid key. `key=value` words override. The
resolved recipe (defaults + file + overrides) is what is hashed and written beside every result.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

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

from terdit_cli.errors import InputFileError, UsageError, did_you_mean
from terdit_cli.strict_yaml import Section, listed, mistakes, parse_yaml, read_mapping

_PACKAGE = Path(__file__).parent
_ROOTS = (_PACKAGE, _PACKAGE.parent)  # installed, or a checkout

VAE_DOWNSAMPLE = 8  # of Stable Diffusion's VAE, which all published recipes use
VAE_CHANNELS = 4

Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


def shipped_recipes() -> dict[str, Path]:
    """Return the file of each shipped recipe, by its name."""
    folders = (root / "recipes" for root in _ROOTS)
    found = next((folder for folder in folders if (folder / "quickstart.yaml").is_file()), None)
    return {} if found is None else {path.stem: path for path in sorted(found.glob("*.yaml"))}


def find_recipe(path: Path) -> Path:
    """Return the file that a path, or the bare name of a shipped recipe, means.

    The user's files come first. A path recipes/NAME.yaml means the shipped one where there is no
    such file, as the documentation calls them.

    Raises:
        InputFileError: a bare name that no recipe has.
    """
    shipped = shipped_recipes()
    if path.is_file():
        return path
    if path.parts[:1] == ("recipes",):
        return next((root / path for root in _ROOTS if (root / path).is_file()), path)
    if len(path.parts) == 1 and path.suffix.lower() not in (".yaml", ".yml"):
        if path.name not in shipped:
            raise InputFileError(
                "recipe not found",
                got=repr(str(path)) + did_you_mean(path.name, shipped),
                expected=f"a .yaml file, or one of {', '.join(shipped)}",
                fix="see `terdit recipes`",
            )
        return shipped[path.name]
    return path


def _at_home(path: Path) -> Path:
    """Return a path with its ~ replaced, which a shell does not do in data.path=~/images."""
    with suppress(RuntimeError):  # a user without a home
        path = path.expanduser()
    return path


UserPath = Annotated[Path, AfterValidator(_at_home)]
DataSource = Literal[
    "embedded", "folder", "zip", "tars", "parquet", "npz", "cifar10", "fashion-mnist", "latents"
]


class ModelSection(Section):
    """The network; `size` gives dim, n_layers and n_heads unless they are given here."""

    size: str = "600m"
    """Named size: nano, tiny, small, base, 600m, 4.2b or 7b. Gives dim, n_layers and n_heads."""
    dim: PositiveInt | None = None
    """Width of the tokens; null: that of `size`."""
    n_layers: PositiveInt | None = None
    """Number of blocks; null: that of `size`."""
    n_heads: PositiveInt | None = None
    """Attention heads; null: those of `size`."""
    n_kv_heads: PositiveInt | None = None
    """Heads of keys and values (grouped-query attention); null: as many as n_heads."""
    patch_size: PositiveInt = 2
    """Side of a patch, in latents or pixels."""
    multiple_of: PositiveInt = 256
    """The feed-forward width is rounded up to a multiple of this."""
    ffn_dim_multiplier: PositiveFloat | None = None
    """Factor on the feed-forward width; null: 1."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    class_dropout_prob: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that a label is dropped, for classifier-free guidance."""
    num_classes: PositiveInt = 1000
    """Number of classes of the data."""
    learn_sigma: bool = True
    """Predict the variance too: twice the output channels."""
    qk_norm: bool = True
    """LayerNorm of queries and keys."""
    pos_embed: bool = False
    """Add DiT's fixed positional embedding to the tokens, in addition to rotary attention."""


# Sets of fields of `ternary`; fields that a set does not name keep their defaults.
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
    """The quantiser; docs/train.md describes the effect of each option."""

    # Fields given beside a preset take precedence; an override ternary.preset=NAME is applied after
    # the file and replaces them. A resolved recipe has no preset: its fields are written out.
    preset: Annotated[Literal["best", "paper"] | None, Field(exclude=True)] = None
    """Several options at once: best (the defaults) or paper (those of the published TerDiT)."""
    enabled: bool = True
    """false trains the full-precision baseline."""
    scale: Literal["learned", "absmean"] = "learned"
    """A trained alpha, or the mean absolute master weight (BitNet)."""
    alpha_init: Literal["randn", "absmean"] = "absmean"
    """Initial value of a learned alpha: random normal, or the mean absolute weight."""
    adaln_norm: bool | None = None
    """RMSNorm after adaLN, the paper's addition; null: as `enabled`."""
    granularity: Literal["tensor", "row", "group128"] = "row"
    """What one scale covers: a matrix, an output row, or 128 inputs of a row."""
    activations: Literal["none", "int8"] = "none"
    """int8 quantises each token's inputs of ternary layers."""
    ste: Literal["scaled", "identity"] = "scaled"
    """Gradient of a master weight: the effective weight's times alpha, or times alpha's sign."""
    ste_clip: PositiveFloat | None = None
    """No gradient for weights beyond this many gammas (mean absolute weight); null: no limit."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out_preset(cls, values: Any) -> Any:
        """Replace a preset by its fields; unknown presets are left to the field's check."""
        if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
            return values
        fields = PRESETS.get(values["preset"])
        if fields is None:
            return values
        return fields | {key: value for key, value in values.items() if key != "preset"}

    def said(self) -> dict[str, Any]:
        """Return the fields that describe the network: full precision has no quantiser."""
        if self.enabled:
            return self.model_dump(mode="json")
        return {"enabled": False, "adaln_norm": bool(self.adaln_norm)}


class DiffusionSection(Section):
    """The objective of the diffusion: what the network learns to predict."""

    objective: Literal["eps"] = "eps"
    """What the network predicts. eps: the noise, with 1000 steps of linearly spaced betas."""


class DataSection(Section):
    """Images and the space the diffusion runs in."""

    source: DataSource = "embedded"
    """Where the training images come from."""
    path: UserPath | None = None
    """Their folder, file or pattern. Not for `embedded`."""
    split: str | None = None
    """Part of the data: train, heldout, all, or a split of a parquet set; null: train, else all."""
    image_size: PositiveInt = 256
    """Side of the training images, in pixels."""
    channels: Literal[1, 3] = 3
    """Channels of pixel-space models: 1 grey, 3 RGB."""
    vae: str | None = None
    """VAE folder or hub id, to train on its latents; null: pixel space."""
    scale_factor: PositiveFloat = 0.18215
    """Factor on the latents."""
    flip: bool = True
    """Mirror half of the images."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Stop at an unreadable image, or skip it."""
    workers: NonNegativeInt = 4
    """Decoding threads."""


class TrainSection(Section):
    """Steps, batches and precision."""

    init_from: UserPath | None = None
    """Run folder or ckpt.pt whose EMA weights initialise a new run; null: random."""
    steps: PositiveInt = 400_000
    """Optimizer steps."""
    global_batch_size: PositiveInt = 256
    """Images per optimizer step, over all processes."""
    micro_batch_size: PositiveInt = 32
    """Images per forward pass of one process."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the blocks; master weights are always fp32."""
    compile: bool = False
    """Compile each block with torch.compile."""
    activation_checkpointing: bool | PositiveInt = False
    """Recompute activations: false, true (every block), or k (every k-th)."""
    max_skipped: NonNegativeInt = 10
    """Consecutive steps without finite gradients that are skipped; one more ends the run."""


class DistillSection(Section):
    """Distillation: the predictions of a trained model become part of the target."""

    teacher: UserPath | None = None
    """Run folder or ckpt.pt whose predictions are part of the target; null: none."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the teacher's prediction in the target; the rest is the noise."""
    schedule: Literal["constant", "linear"] = "constant"
    """linear: the weight falls to 0 by the last step."""
    features: NonNegativeFloat = 0.0
    """Loss weight of the relative squared difference between the last blocks' outputs."""


class ParallelSection(Section):
    """How several processes share the work; no effect on a single process."""

    mode: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: every process holds everything; fsdp: sharded; hsdp: sharded in groups."""
    shard_size: PositiveInt | None = None
    """Processes that share one copy (hsdp); null: all of one machine."""
    reshard_after_forward: bool = True
    """Free gathered weights between forward and backward (fsdp, hsdp)."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over processes."""
    cpu_offload: bool = False
    """Keep master weights and optimizer state in host memory; full precision only."""
    hang_seconds: PositiveFloat = 600
    """Seconds without a completed step after which the job is ended."""


class OptimSection(Section):
    """The optimizer and its learning-rate schedule."""

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw; adamw8bit: 8-bit state (torchao); muon: Muon for the blocks' matrices."""
    lr: PositiveFloat = 1e-4
    """Learning rate after warm-up."""
    alpha_lr_ratio: PositiveFloat = 1.0
    """Learning rate of the learned scales, relative to lr."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Decay rates of Adam's averages of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to Adam's denominator."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    decayed: Literal["matrices", "blocks"] = "matrices"
    """Which matrices get weight decay: all, or only those of the blocks."""
    grad_clip: PositiveFloat | None = 2.0
    """Largest L2 norm of all gradients; null: no clipping."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Course of the learning rate after warm-up."""
    final_lr_ratio: Fraction = 0.0
    """Final learning rate relative to lr (cosine)."""
    drop_at: tuple[Fraction, ...] = (0.7,)
    """Fractions of the run after which the learning rate drops (step)."""
    drop_factor: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Factor of each drop (step)."""


class EmaSection(Section):
    """The averaged weights that previews, ternarize and pack use."""

    decay: Fraction = 0.9999
    """Decay of the exponential moving average, per step."""
    warmup: bool = False
    """Shorter average in the first steps."""


class SampleSection(Section):
    """Preview grids generated with the EMA weights during training."""

    every: NonNegativeInt = 5_000
    """Steps between preview grids; 0: none."""
    count: PositiveInt = 16
    """Images per grid; image i has class i mod num_classes."""
    sampler: Literal["ddpm", "ddim", "dpmpp-2m", "unipc", "euler"] = "dpmpp-2m"
    """Sampler of the previews."""
    steps: PositiveInt = 20
    """Sampling steps."""
    cfg_scale: NonNegativeFloat = 4.0
    """Scale of classifier-free guidance; 1 turns it off."""


class WandbSection(Section):
    """Where Weights & Biases stores the run."""

    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team; null: the account's default."""
    mode: Literal["online", "offline"] = "online"
    """offline keeps the run on disk until it is synced."""


class LoggingSection(Section):
    """metrics.jsonl and loss.png are always written; TensorBoard and Weights & Biases optional."""

    every: PositiveInt = 100
    """Steps between entries of metrics.jsonl."""
    tensorboard: bool = False
    """Also write RUN/tensorboard."""
    wandb: WandbSection | None = None
    """Also log to Weights & Biases: {project: NAME}; null: off."""


class CheckpointSection(Section):
    """Resumable checkpoints."""

    every: PositiveInt = 10_000
    """Steps between checkpoints."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every_hours: PositiveFloat | None = None
    """Also keep one older checkpoint per this many hours; null: none."""


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the run; its folder is runs/NAME."""
    seed: NonNegativeInt = 0
    """Random seed of weights, data order, noise and labels."""
    model: ModelSection = ModelSection()
    ternary: TernarySection = TernarySection()
    diffusion: DiffusionSection = DiffusionSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    distill: DistillSection = DistillSection()
    parallel: ParallelSection = ParallelSection()
    optim: OptimSection = OptimSection()
    ema: EmaSection = EmaSection()
    sample: SampleSection = SampleSection()
    logging: LoggingSection = LoggingSection()
    checkpoint: CheckpointSection = CheckpointSection()

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


class Mistake(NamedTuple):
    """What is wrong with a recipe whose fields are each possible, and the word that mends it."""

    text: str
    fix: str | None = None  # key=value


def mistakes_between(recipe: Recipe) -> Iterator[Mistake]:
    """Iterate over the fields that do not fit together."""
    data, train, parallel = recipe.data, recipe.train, recipe.parallel
    if data.source != "embedded" and data.path is None:
        yield Mistake(f"data.path is needed for source {data.source!r}")
    if data.source == "embedded" and data.path is not None:
        yield Mistake(
            f"data.path {data.path} is not for the source embedded, the packaged images: set "
            "data.source"
        )
    if data.source == "latents" and data.vae is None:
        yield Mistake("data.vae is needed for source 'latents': the VAE that prepared them")
    if data.source == "latents" and data.split is not None:
        yield Mistake("data.split is chosen when latents are prepared", "data.split=null")
    if data.vae is not None and data.image_size % VAE_DOWNSAMPLE:
        yield Mistake(
            f"data.image_size {data.image_size} must be a multiple of {VAE_DOWNSAMPLE}, "
            "the VAE's downsampling",
            f"data.image_size={_nearest_multiple(data.image_size, VAE_DOWNSAMPLE)}",
        )
    elif recipe.input_size % recipe.model.patch_size:
        pixels = recipe.model.patch_size * (VAE_DOWNSAMPLE if data.vae is not None else 1)
        yield Mistake(
            f"data.image_size {data.image_size} must be a multiple of {pixels}, the "
            f"pixels that model.patch_size {recipe.model.patch_size} spans",
            f"model.patch_size={nearest_divisor(recipe.input_size, recipe.model.patch_size)}",
        )
    if train.global_batch_size % train.micro_batch_size:
        wanted = _nearest_multiple(train.global_batch_size, train.micro_batch_size)
        yield Mistake(
            f"train.global_batch_size {train.global_batch_size} must be a multiple of "
            f"train.micro_batch_size {train.micro_batch_size}",
            f"train.global_batch_size={wanted}",
        )
    if recipe.distill.features and recipe.distill.teacher is None:
        yield Mistake("distill.features needs distill.teacher: whose features are to be met")
    if parallel.shard_size is not None and parallel.mode != "hsdp":
        yield Mistake(
            f"parallel.shard_size needs parallel.mode=hsdp, not {parallel.mode!r}",
            "parallel.mode=hsdp",
        )
    if parallel.cpu_offload and parallel.mode == "ddp":
        yield Mistake("parallel.cpu_offload needs parallel.mode=fsdp or hsdp", "parallel.mode=fsdp")
    if parallel.cpu_offload and recipe.ternary.enabled:  # see train/ternary_cache.py
        yield Mistake("parallel.cpu_offload needs ternary.enabled=false: trits stay on GPUs")


def nearest_divisor(number: int, near: int) -> int:
    """Return the divisor of `number` nearest to `near`, of two equally near the smaller."""
    divisors = (part for part in range(1, number + 1) if number % part == 0)
    return min(divisors, key=lambda part: (abs(part - near), part))


def _nearest_multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of


def load_recipe(
    path: Path,
    overrides: Iterable[str] = (),
    more: Callable[[Recipe], Iterable[Mistake]] | None = None,
) -> Recipe:
    """Read, override and check a recipe, the user's or one that is shipped.

    Args:
        more: what else may be wrong; asked only where fields do not fit together, so that all is
            told at once.

    Raises:
        InputFileError: the file is missing or not YAML.
        UsageError: one sentence for each unknown key, wrong type or impossible value.
    """
    path = find_recipe(path)
    values = read_mapping(path, "recipe")
    # A preset replaces what the file says; fields given as overrides win, before or after it.
    for word in sorted(overrides, key=lambda word: not word.startswith("ternary.preset=")):
        _apply_override(values, word)
    return parse_recipe(values, path, more)


def parse_recipe(
    values: Any, where: object, more: Callable[[Recipe], Iterable[Mistake]] | None = None
) -> Recipe:
    """Check plain values (as from YAML); raises UsageError listing every mistake."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise mistakes(error, Recipe, "recipe", where, _FIX) from error
    found = list(mistakes_between(recipe))
    if found:
        raise refusal([*found, *(more(recipe) if more is not None else ())], where)
    return recipe


_FIX = "correct the recipe or pass key=value words"


def refusal(found: Sequence[Mistake], where: object) -> UsageError:
    """Return one error that lists all mistakes, and the words that mend them."""
    words = " ".join(dict.fromkeys(mistake.fix for mistake in found if mistake.fix))
    return listed(
        [mistake.text for mistake in found], "recipe", where, f"add {words}" if words else _FIX
    )


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
            raise ValueError("the text after ' #' would be a comment")
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
                "an override names a key inside a single value", got=repr(word),
                fix=f"set {section} itself: it has no keys",
            )  # fmt: skip
    if key == "ternary.preset":  # applied after the file, so it replaces what the file says
        for name in PRESETS["paper"]:
            values.pop(name, None)
    values[last] = value
