"""The text that ships with the repository and the program that made it; see README.md here."""
