"""The processes of a run: who lives, who agrees, when all leave."""
