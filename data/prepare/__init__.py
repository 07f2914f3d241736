"""From files to a token store."""
