"""Operations of training, counted on paper.

    forward = 2 * T * (matrices of the blocks, of the patch embedding and of the last layer)
            + 4 * T^2 * D * n_layers                     (q k^T and the weighted sum of v)
            + 2 * (matrices that act on the conditioning, once an image)
    training = 3 * forward                               (the backward pass has two products)
    MFU      = training operations a second / peak

One multiplication with its addition counts as two operations. Recomputed activations do not
count: MFU is about useful work (PaLM, arXiv 2204.02311, appendix B). Nor does the quantiser,
whose cost is O(weights) a step.
"""

from __future__ import annotations

from terdit_cli.model.dit import TIMESTEP_WIDTH, DiTConfig

BACKWARD_AND_FORWARD = 3


def training_flops(config: DiTConfig) -> int:
    """Return the operations of training on one image (forward and backward)."""
    dim, width, tokens = config.dim, config.conditioning_width, config.tokens
    of_tokens, of_images = (config.n_layers * weights for weights in config.block_weights)
    patch = config.patch_size**2
    a_token = of_tokens + dim * patch * (config.in_channels + config.out_channels)
    an_image = of_images + width * (2 * dim + TIMESTEP_WIDTH + width)
    attention = 2 * tokens**2 * dim * config.n_layers
    return BACKWARD_AND_FORWARD * 2 * (tokens * a_token + an_image + attention)
