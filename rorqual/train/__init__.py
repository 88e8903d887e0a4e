"""Trains a model from a config into a run folder. Only engine.py imports OLMo-core."""
