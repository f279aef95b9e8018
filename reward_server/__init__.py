"""The judge's side: protocols of the judge families, hosting, training. Imports nothing of the trainer."""

import os

# Read when Hugging Face's libraries are first imported, whichever of them that is.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
