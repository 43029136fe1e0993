"""docs/recipes.md: every key of a recipe, from the models in `recipe.py`.

python -m terdit_cli.lab.recipe_docs docs/recipes.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from terdit_cli.recipe import Recipe
from terdit_cli.system.atomic import write_whole

HEAD = """# Recipes

Every key of a recipe, with its type, default and meaning. This page is generated from the code:
`make docs`. [train.md](train.md) explains what the options do to training; a value that is not
possible is refused with its key, and misspelt keys are answered with the nearest one.

```yaml
name: mine
seed: 0
model: {size: nano, patch_size: 7, num_classes: 10}
data: {source: embedded, image_size: 28, channels: 1, flip: false}
train: {steps: 1000, global_batch_size: 64, micro_batch_size: 64}
optim: {lr: 1e-3, warmup_steps: 50}
logging: {every: 50, wandb: {project: my-project}}
```

`terdit train mine.yaml optim.lr=2e-3` overrides a key on the command line.
"""


def recipe_page() -> str:
    """Return the page in Markdown."""
    schema = Recipe.model_json_schema()
    parts = [HEAD, "## Top level\n", _table(Recipe, schema, schema)]
    for name, section in _sections(Recipe).items():
        inner = schema["$defs"][section.__name__]
        parts += [f"## {name}\n", f"{section.__doc__}\n", _table(section, inner, schema)]
        for key, nested in _sections(section).items():
            inner = schema["$defs"][nested.__name__]
            parts += [f"### {name}.{key}\n", f"{nested.__doc__}\n", _table(nested, inner, schema)]
    return "\n".join(part.strip() + "\n" for part in parts)


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the fields that are sections of their own."""
    found = {}
    for name, item in model.model_fields.items():
        options = getattr(item.annotation, "__args__", (item.annotation,))
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                found[name] = option
    return found


def _table(model: type[BaseModel], values: dict[str, Any], schema: dict[str, Any]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, item in model.model_fields.items():
        if model is Recipe and name in _sections(model):
            continue
        kind = _kind(values["properties"][name], schema)
        rows.append(f"| `{name}` | {kind} | {_default(item)} | {item.description} |")
    return "\n".join(rows) + "\n"


def _default(item: FieldInfo) -> str:
    if item.is_required():
        return "required"
    value = item.default
    if isinstance(value, tuple):
        value = list(value)
    return f"`{json.dumps(value)}`".replace('"', "")


_LIMITS = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}


def _kind(value: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return the type of a value in words, with its limits."""
    if "$ref" in value:
        return "section"
    if "anyOf" in value:
        kinds = dict.fromkeys(_kind(option, schema) for option in value["anyOf"])
        return " or ".join(kinds)
    if "enum" in value:
        return ", ".join(map(str, value["enum"]))
    if "const" in value:
        return str(value["const"])
    if value.get("type") == "array":
        inner = value.get("items") or value.get("prefixItems", [{}])[0]
        return f"list of {_kind(inner, schema)}"
    limits = [f"{sign} {value[key]:g}" for key, sign in _LIMITS.items() if key in value]
    kind = {"null": "null", "boolean": "true, false", "string": "text"}.get(
        value["type"], value["type"]
    )
    kind = "path" if value.get("format") == "path" else kind
    return " ".join([kind, *limits])


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Write docs/recipes.md.")
    parser.add_argument("page", type=Path)
    write_whole(parser.parse_args().page, recipe_page())


if __name__ == "__main__":
    main()
