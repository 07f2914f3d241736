"""Every picture in one look: its colors, its numbers, its lines and bars, drawn by matplotlib."""
