"""Trits on disk: codecs, the .tdt file and other formats that convert into it."""
