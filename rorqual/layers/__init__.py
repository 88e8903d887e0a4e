"""The layers of a model. Each file holds one paper or one part of one.

A layer maps hidden states to hidden states. Nothing here handles text or process ranks.
"""
