"""From a model file to images: the generator, its options, and saved images."""
