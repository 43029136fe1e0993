"""Where images come from: one file and one row of `image_sources.SOURCES` for each."""
