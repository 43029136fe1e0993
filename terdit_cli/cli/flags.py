"""Turns dataclasses of options into flags; flags that several verbs share. No torch here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from terdit_cli.errors import UsageError
from terdit_cli.generate.options import Weights
from terdit_cli.system.memory import require_room

WITHOUT_TORCH = ("models",)  # verbs that run without it

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")]
Ema = Annotated[
    bool,
    typer.Option("--ema/--raw", help="Use a checkpoint's EMA weights, or those of its last step."),
]


def weights_of(ema: bool) -> Weights:
    """Return the choice of `Ema` by its name in the Python API."""
    return "ema" if ema else "raw"


def expanded(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn each parameter whose type is a dataclass into one flag for each of its fields.

    The fields are declared by `option`. Fields declared otherwise have no flag.
    """
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {
        name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if name in groups:
            parameters += _parameters(groups[name])
        else:
            parameters.append(
                parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            )

    @functools.wraps(verb)
    def call(**values: Any) -> None:
        for name, kind in groups.items():
            fields = [item.name for item in _declared(kind)]
            values[name] = kind(**{field: _value(values.pop(field)) for field in fields})
        verb(**values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {item.name: item.annotation for item in parameters} | {"return": None}
    return call


def _value(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


def _annotation(hint: Any) -> Any:
    """Return the type that Typer repeats a flag for: a list where a field is a tuple."""
    return list[get_args(hint)[0]] if get_origin(hint) is tuple else hint  # type: ignore[misc]


def _declared(kind: Any) -> list[dataclasses.Field[Any]]:
    return [item for item in dataclasses.fields(kind) if "help" in item.metadata]


def _parameters(kind: Any) -> list[inspect.Parameter]:
    """Return the keyword parameters of a verb that stand for the fields of a dataclass."""
    hints = get_type_hints(kind)
    return [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=list(item.default) if isinstance(item.default, tuple) else item.default,
            annotation=Annotated[
                _annotation(hints[item.name]),
                typer.Option(
                    *item.metadata["flags"],
                    help=item.metadata["help"],
                    rich_help_panel=item.metadata["group"] or getattr(kind, "GROUP", None),
                    **item.metadata["settings"],
                ),
            ],
        )
        for item in _declared(kind)
    ]


def names_of(*kinds: Any) -> tuple[str, ...]:
    """Return the names of the options that dataclasses declare."""
    return tuple(item.name for kind in kinds for item in _declared(kind))


def refuse_given(context: typer.Context, names: Collection[str], only: str) -> None:
    """Raise UsageError if one of these parameters is on the command line but would have no effect.

    Args:
        only: what they are for, as in "for a --dry-run".
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            flag = parameter.opts[0]
            raise UsageError(
                f"{flag} would have no effect here: it is {only}", fix=f"leave {flag} out"
            )


class Command(TyperCommand):
    """A verb: checks that there is memory to begin, and that its `--help` is under headings."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; raises EnvironmentProblem where a limit leaves no memory for torch."""
        if ctx.info_name not in WITHOUT_TORCH:
            require_room(f"terdit {ctx.info_name}")
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help of arguments and options, those of no heading first."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                title = getattr(parameter, "rich_help_panel", None) or kind
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def examples(*lines: str) -> str:
    """Return the end of a verb's help."""
    return "Examples:\n\n" + "\n\n".join(lines)
