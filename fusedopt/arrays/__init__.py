"""Arrays and what is stored in them: trees, checks, formats, states, files."""
