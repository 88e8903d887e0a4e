"""A command line in -> one call into a room out."""
