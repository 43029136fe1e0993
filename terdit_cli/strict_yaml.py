"""YAML files of sections, read strictly: every mistake is an error, all reported at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from terdit_cli.errors import InputFileError, UsageError, did_you_mean

LARGEST_FILE = 1 << 20  # bytes
MOST_NODES = 10_000  # keys and values of a file, a thousand times a recipe's: about a second's work
MOST_MISTAKES = 20  # told at once
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
        kinds = (annotation, *get_args(annotation))
        if bool not in kinds and any(isinstance(part, bool) for part in parts):
            word = "yes/no" if isinstance(value, bool) else "a list with yes/no"
            section = _section_in(kinds)
            expected = "another value" if section is None else _keys_of(section)
            raise ValueError(f"got {value}, {word}; expected {expected}")
        return value


def _section_in(kinds: Iterable[Any]) -> type[BaseModel] | None:
    """Return the section among the types that a field may have, if there is one."""
    sections = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return next(sections, None)


def _keys_of(section: type[BaseModel]) -> str:
    """Return how a section is written: the keys it needs, or some that it has."""
    needed = [name for name, item in section.model_fields.items() if item.is_required()]
    shown = needed or [*list(section.model_fields)[:2], "..."]
    return "{" + ", ".join(f"{name}: {name.upper()}" if needed else name for name in shown) + "}"


class TooManyNodes(yaml.YAMLError):
    """A text with more keys and values than anything that is meant to be read here."""


class _StrictLoader(yaml.SafeLoader):
    """A safe loader for which repeated keys are errors instead of the last one winning.

    So are aliases (`*name`): a few of them can stand for gigabytes. What has too many keys and
    values is refused at the first that is one too many, not when all have been read.
    """

    _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes += 1
        if self._nodes > MOST_NODES:
            raise TooManyNodes(f"more than {MOST_NODES} keys and values")
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None, None, "aliases (*name) are not allowed", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
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
        UsageError: more keys and values than any such file needs.
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
    except TooManyNodes as error:
        raise UsageError(
            f"the {kind} is too long", got=error, expected="some dozens", where=path,
            fix=f"give the path of a {kind}",
        ) from error  # fmt: skip
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
    return listed(lines, kind, where, fix)


def listed(lines: Sequence[str], kind: str, where: object, fix: str) -> UsageError:
    """Return one error with a line for each mistake.

    The first `MOST_MISTAKES` are listed, the others are counted.
    """
    count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
    if (left := len(lines) - MOST_MISTAKES) > 0:
        lines = [*lines[:MOST_MISTAKES], f"and {left} more"]
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
    if problem["type"] in ("model_type", "model_attributes_type"):
        kinds = _annotations_at(location, root)
        section = _section_in(kinds)
        message = f"{path}: got {problem['input']!r}, expected {_keys_of(section or root)}"
    if problem["type"] == "literal_error":
        choices = str(problem["ctx"]["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        message += did_you_mean(str(problem["input"]), choices)
    if problem["type"] == "missing":
        message = f"{path}: missing"
    return message


def _annotations_at(location: list[str], root: type[BaseModel]) -> tuple[Any, ...]:
    """Return the types that the field at a path of names may have."""
    section, kinds = root, tuple[Any, ...]()
    for name in location:
        if name not in section.model_fields:
            continue  # the place in a list, or pydantic's name of a choice
        annotation = section.model_fields[name].annotation
        kinds = (annotation, *get_args(annotation))
        section = _section_in(kinds) or section
    return kinds


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
