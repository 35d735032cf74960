"""Scores of answers: by measures, models and judges."""
