"""Reads and writes other formats: DeepSeek folders, transformers models, Engram in any host."""
