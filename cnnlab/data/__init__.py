"""Data sets, their splits and the loader. Imports nothing: decoding processes import this package too."""
