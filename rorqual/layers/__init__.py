"""Hidden states in -> hidden states out: one paper, or one part of one, a file; nothing here knows text or ranks."""
