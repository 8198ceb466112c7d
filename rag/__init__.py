"""Documents in, cited answers out: load, chunk, embed, index, retrieve, ask."""
