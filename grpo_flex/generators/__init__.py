"""Generators: FLUX and Wan behind one protocol."""
