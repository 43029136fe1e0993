"""Images from a model file: the generator, its options, and saved images."""
