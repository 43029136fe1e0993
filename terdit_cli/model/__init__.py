"""The network: the diffusion transformer and its ternary linear layer."""
