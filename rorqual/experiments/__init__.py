"""configs -> runs -> conclusions."""
