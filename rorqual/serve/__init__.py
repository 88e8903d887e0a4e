"""Serving: requests in -> text out."""
