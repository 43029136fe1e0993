"""terdit: ternary diffusion transformers, from recipe to image.

>>> import terdit_cli
>>> images = terdit_cli.load_pipeline("fashion-mnist").generate(classes=["Sneaker"], n=4)
>>> network = terdit_cli.load_model("fashion-mnist")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from terdit_cli.generate.pipeline import load_pipeline
    from terdit_cli.runtime.load import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "load_pipeline"]


def __getattr__(name: str) -> Any:
    """Import the API on first use, so that `terdit --help` never imports torch."""
    if name not in ("load_model", "load_pipeline"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from terdit_cli.system.openmp import bound_spinning

    bound_spinning()
    if name == "load_model":
        from terdit_cli.runtime.load import load_model

        return load_model
    from terdit_cli.generate.pipeline import load_pipeline

    return load_pipeline


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
