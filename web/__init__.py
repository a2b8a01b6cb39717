"""The page: what a visitor sees, and the code between it and the model thread."""
