"""The operating system: atomic files, locks, signals, processes, GPUs."""
