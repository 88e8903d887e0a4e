"""Hidden states in -> hidden states out: one paper, or one part of one, a file. Nothing here knows text or processes."""
