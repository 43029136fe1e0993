"""What the operating system gives: atomic files, locks, signals, processes, GPUs."""
