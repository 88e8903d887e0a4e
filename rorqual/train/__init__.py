"""Trains a model from a config into a run folder. Only engine.py imports OLMo-core."""

import logging

# While it is imported OLMo-core warns of each accelerator package that is not installed; the errors
# that it raises are enough.
logging.getLogger("olmo_core").setLevel(logging.CRITICAL)
