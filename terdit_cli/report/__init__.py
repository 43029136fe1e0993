"""Tools for figures and pages, shared by evaluation, training curves and the lab."""
