"""Scores of generated images: features, statistics, distances."""
