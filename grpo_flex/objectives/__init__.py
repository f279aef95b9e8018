"""Objectives: one file each, from a recorded group to losses."""
