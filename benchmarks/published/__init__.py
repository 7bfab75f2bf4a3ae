"""Rooms of `published_runs.py`: rows, setups, predictors, baseline, scores, calibration."""
