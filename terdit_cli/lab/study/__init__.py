"""A study: named variants of one recipe, trained alike, scored alike, shown on one page."""
