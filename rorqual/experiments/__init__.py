"""Experiments that train several configs and draw conclusions from the runs."""
