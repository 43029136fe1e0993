"""Trits on disk: codecs, the .tdt file and other formats that can be converted to it."""
