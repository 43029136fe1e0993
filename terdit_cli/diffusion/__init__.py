"""The diffusion process and the samplers that invert it."""
