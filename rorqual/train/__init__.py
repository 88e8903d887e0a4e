"""Training: from a config to a run folder. Only engine.py names OLMo-core."""
