"""The command line: a Typer app, one file for each verb. Nothing here imports torch."""
