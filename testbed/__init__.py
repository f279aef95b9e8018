"""A procedural world of shapes with a tiny, genuinely trained FLUX pipeline and an exact judge."""
