"""Generates text from a trained model, in a process or over HTTP."""
