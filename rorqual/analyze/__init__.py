"""models -> numbers -> pages."""
