"""The packaged models with their cards, by name."""
