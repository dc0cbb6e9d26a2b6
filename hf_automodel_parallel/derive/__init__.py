"""Plans for models that bring none: derived from one forward of a miniature, and used only where they are proven on it."""
