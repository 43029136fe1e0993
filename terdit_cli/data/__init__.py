"""Images in, batches in a reproducible order, latents, and image grids out."""
