"""The kit for figures and pages, shared by scores, training curves and the lab."""
