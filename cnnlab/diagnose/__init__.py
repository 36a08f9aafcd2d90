"""Instruments: what is measured of a network before and beside its training, against theory, and put into words."""
