"""Running a packed model: backends and the modules that call them."""
