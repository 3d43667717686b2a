"""Whole models, timed: what evaluation/benchmark cannot do, for it knows no models."""
