"""The metadata of every artefact, so that nothing else is needed to use it.

`ModelInfo` travels unchanged from the training checkpoint through the ternarized safetensors
file into the .tdt: the network's configuration, the diffusion process, the space it runs in, the
classes and their order, and where it came from. Plain JSON types only.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import terdit_cli
from terdit_cli.diffusion.objectives import OBJECTIVES, EpsObjective, objective_of
from terdit_cli.errors import InputFileError, TerditError
from terdit_cli.model.dit import DiTConfig
from terdit_cli.model.ternary import TernaryConfig

LARGEST_INTEGER = 1 << 20  # of any dimension in a file; the largest published model needs 18,432
LARGEST_TABLE = (
    1 << 24
)  # of the positional table, whose size no tensor in a file shows. 4.2b-512: 98,304


@dataclass(frozen=True)
class SpaceInfo:
    """Where the diffusion runs: pixels in [-1, 1], or the latents of a VAE."""

    kind: Literal["pixel", "vae"] = "pixel"
    vae: str | None = None  # folder or hub id
    scale_factor: float = 1.0


@dataclass(frozen=True)
class ModelInfo:
    """The metadata of a model file; `class_order` says how class ids map to label rows.

    "standard": row = class id. "text": the rows of ids 0..n-1 sorted as text ("0", "1", "10",
    "100", ...), which the released TerDiT checkpoints use.
    """

    config: DiTConfig
    ternary: TernaryConfig
    space: SpaceInfo
    image_size: int
    class_names: list[str] = field(default_factory=list)
    class_order: Literal["standard", "text"] = "standard"
    diffusion: dict[str, object] = field(default_factory=lambda: dict(EpsObjective.description))
    weights: Literal["ema", "raw"] = "ema"
    step: int | None = None
    recipe_sha256: str | None = None
    tool_version: str = terdit_cli.__version__

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Any, where: object) -> ModelInfo:
        """Check and rebuild the result of `to_dict`.

        Raises:
            InputFileError: a missing, unknown or impossible field; `where` names the file.
        """
        try:
            values = dict(values)
            sections = {
                "config": DiTConfig,
                "ternary": TernaryConfig,
                "space": SpaceInfo,
            }
            for name, section in sections.items():
                fields = dict(values[name])
                check_types(section, fields)
                values[name] = section(**fields)
            check_types(cls, values)
            info = cls(**values)
            if any(type(value) not in (str, int, float) for value in info.diffusion.values()):
                raise ValueError(f"a diffusion of {list(map(type, info.diffusion.values()))}")
            width = info.config.dim if info.config.pos_embed else info.config.head_dim
            if info.config.tokens * width > LARGEST_TABLE:
                raise ValueError(f"a network of {info.config.tokens} tokens is too large")
            if info.class_names and len(info.class_names) != info.config.num_classes:
                count = len(info.class_names)
                raise ValueError(f"{count} class names for {info.config.num_classes} classes")
            if info.image_size < 1 or not 0 < info.space.scale_factor < math.inf:
                scale = info.space.scale_factor
                raise ValueError(f"images of {info.image_size} pixels, latents times {scale}")
            if info.config.ffn_width > LARGEST_INTEGER:
                raise ValueError(f"a feed-forward width of {info.config.ffn_width} is too large")
        except (TypeError, KeyError, ValueError, TerditError) as error:
            raise InputFileError(
                "the model's description cannot be read",
                got=f"{type(error).__name__}: {error}",
                expected="the metadata that terdit writes",
                where=where,
                fix="write the file again with `terdit pack`",
            ) from error
        try:
            objective_of(info.diffusion)
        except KeyError:
            raise InputFileError(
                "unknown diffusion process",
                got=info.diffusion,
                expected=" or ".join(str(make.description) for make in OBJECTIVES.values()),
                where=where,
                fix="update terdit",
            ) from None
        return info

    @classmethod
    def from_json(cls, text: str, where: object) -> ModelInfo:
        """Parse `to_json`'s text; raises InputFileError as `from_dict`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputFileError(
                "the model's description is not JSON", got=error, where=where,
                expected="the metadata that terdit writes",
                fix="write the file again with `terdit pack`",
            ) from error  # fmt: skip
        return cls.from_dict(values, where)

    def label_rows(self) -> list[int]:
        """Return, for each standard class id, its row of the label table; then the null class."""
        ids = range(self.config.num_classes)
        if self.class_order == "standard":
            return [*ids, self.config.num_classes]
        row = {class_id: index for index, class_id in enumerate(sorted(ids, key=str))}
        return [*(row[class_id] for class_id in ids), self.config.num_classes]


def check_types(section: type, values: dict[str, Any]) -> None:
    """Raise ValueError unless each value has the JSON type its field declares."""
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        if item.name not in values:
            continue
        value, declared = values[item.name], str(item.type)
        if get_origin(hints[item.name]) is Literal:
            choices = get_args(hints[item.name])
            if value not in choices:
                raise ValueError(f"{item.name} is {value!r}, expected one of {choices}")
            continue
        if value is None and "None" in declared:
            continue
        kinds: dict[str, tuple[type, ...]] = {
            "int": (int,),
            "float": (float, int),
            "bool": (bool,),
            "str": (str,),
            "list[str]": (list,),
            "dict[str, object]": (dict,),
        }
        expected = kinds.get(declared.removesuffix(" | None"))
        if expected is None:
            continue
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise ValueError(f"{item.name} is {value!r}, expected {declared}")
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER and item.name != "step":
            raise ValueError(f"{item.name} is {value}, expected at most {LARGEST_INTEGER}")
        if isinstance(value, list) and not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"{item.name} must hold strings")
