"""The packaged models, and where they came from: NAME.tdt with its card NAME.md."""
