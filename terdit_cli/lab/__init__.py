"""Instruments for developers: benchmarks, studies, the demo. Only the command line imports them."""
