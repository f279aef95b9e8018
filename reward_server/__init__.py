"""The judge's side: protocols of the judge families, and hosting. Imports nothing of the trainer."""
