"""The Python API behind each verb: `run(...)` returns a result dataclass; no Typer here."""
