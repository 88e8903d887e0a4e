"""Turns text and files into token ids, documents and batches; imports nothing from above."""
