"""Runs a command line by calling one function of the package that implements it."""
