"""The gpu backend: Triton kernels that multiply with packed trits."""
