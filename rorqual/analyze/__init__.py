"""Measurements of trained models, and the figures and pages made from them."""
