"""The main job: a run directory and its stages."""
