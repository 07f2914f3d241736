"""The processes of a run: which are alive, what they agree on, when all leave."""
