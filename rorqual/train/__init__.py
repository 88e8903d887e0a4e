"""A config in -> a trained model out. The training engine, OLMo-core, is named in this room only."""
