"""YAML files of sections, read strictly: every mistake is an error, all reported at once."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from terdit_cli.errors import InputFileError, UsageError, did_you_mean

LARGEST_FILE = 1 << 20  # bytes
MOST_KEYS = 10_000  # of one mapping
_PLURALS = {"recipe": "recipes", "study": "studies"}


class Section(BaseModel):
    """Unknown keys are errors; values never change after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # the description of a field
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse YAML's `yes` where a number is expected: pydantic would read it as 1."""
        field = cls.model_fields[str(info.field_name)]
        annotation = field.annotation
        parts = value if isinstance(value, list | tuple) else [value]
        if bool not in (annotation, *get_args(annotation)) and any(
            isinstance(part, bool) for part in parts
        ):
            raise ValueError(f"got {value}, expected a value, not yes/no: {field.description}")
        return value


class _StrictLoader(yaml.SafeLoader):
    """A safe loader for which repeated keys are errors instead of the last one winning.

    So are aliases (`*name`): a few of them can stand for gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None, None, "aliases (*name) are not allowed", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    if len(node.value) > MOST_KEYS:
        raise yaml.constructor.ConstructorError(
            None, None, f"{len(node.value)} keys, expected at most {MOST_KEYS}", node.start_mark
        )
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, f"a {type(key).__name__} as a key", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse_yaml(text: str) -> Any:
    """Return the plain values of a YAML text; raises yaml.YAMLError, RecursionError, ValueError."""
    return yaml.load(text, Loader=_StrictLoader)


def read_mapping(path: Path, kind: Literal["recipe", "study"]) -> dict[str, Any]:
    """Read a YAML file of sections, strictly: no repeated keys, no aliases.

    Args:
        kind: what error messages call the file.

    Raises:
        InputFileError: missing, too large, or not YAML with a mapping at the top.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        absent = isinstance(error, FileNotFoundError)
        raise InputFileError(
            f"{kind} not found" if absent else f"cannot read the {kind}",
            got=None if absent else error.strerror or error,
            where=path,
            fix=f"available {_PLURALS[kind]}: " + ", ".join(near)
            if near
            else "give the path of a .yaml file",
        ) from error
    if len(data) > LARGEST_FILE:
        raise InputFileError(
            f"the {kind} is too large", expected=f"at most {LARGEST_FILE} bytes", where=path,
            fix=f"give the path of a {kind}",
        )  # fmt: skip
    text = _decoded(data, kind, path)
    try:
        values = parse_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputFileError(
            f"the {kind} is not valid YAML", got=" ".join(str(error).split()), where=path,
            fix="correct that place",
        ) from error  # fmt: skip
    if not isinstance(values, dict):
        got = "an empty file" if values is None else f"a {type(values).__name__}"
        raise InputFileError(
            f"the {kind} is not a mapping", got=got, where=path,
            expected="sections such as `model:` and `train:`",
            fix=f"start from a copy of a shipped {kind}",
        )  # fmt: skip
    return values


def _decoded(data: bytes, kind: str, path: Path) -> str:
    """Return the text of a file; raises InputFileError for other encodings than UTF-8."""
    encoding = "UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data else None
    try:
        if encoding is None:
            return data.decode("utf-8-sig")  # editors on Windows begin files with a byte-order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        encoding = f"byte {data[error.start]:#04x} in line {line}, perhaps Latin-1 or Windows-1252"
    raise InputFileError(
        f"the {kind} is not UTF-8 text", got=encoding, expected="UTF-8", where=path,
        fix="save it as UTF-8 in your editor",
    )  # fmt: skip


def mistakes(
    error: ValidationError, root: type[BaseModel], kind: str, where: object, fix: str
) -> UsageError:
    """Return one error that lists everything pydantic found; `root` is the validated model."""
    lines = [_explain(problem, root) for problem in error.errors(include_url=False)]
    count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
    return UsageError(
        f"the {kind} has {count}:\n  " + "\n  ".join(lines) + "\n", where=where, fix=fix
    )


def _explain(problem: Any, root: type[BaseModel]) -> str:
    """Turn one pydantic error into "train.stepz: unknown key (did you mean 'steps'?)"."""
    location = [str(part) for part in problem["loc"]]
    path = ".".join(location)
    if problem["type"] == "extra_forbidden":
        siblings = _fields_at(location[:-1], root)
        hint = did_you_mean(location[-1], siblings)
        return f"{path}: unknown key{hint or ', known are ' + ', '.join(siblings)}"
    if problem["type"] == "value_error":
        return (path + ": " if len(location) > 1 else "") + str(problem["ctx"]["error"])
    message = f"{path}: got {problem['input']!r}, expected: {problem['msg']}"
    if problem["type"] == "literal_error":
        choices = str(problem["ctx"]["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        message += did_you_mean(str(problem["input"]), choices)
    if problem["type"] == "missing":
        message = f"{path}: missing"
    return message


def _fields_at(location: list[str], section: type[BaseModel]) -> list[str]:
    """Return the field names of the section at a path of section names below another."""
    for name in location:
        if name.isdecimal():  # the place in a list of sections
            continue
        annotation = section.model_fields[name].annotation if name in section.model_fields else None
        inner = [
            part
            for part in (annotation, *get_args(annotation))
            if isinstance(part, type) and issubclass(part, BaseModel)
        ]
        if not inner:
            return []
        section = inner[0]
    return list(section.model_fields)
