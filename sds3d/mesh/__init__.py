"""Meshes: extraction, cleaning, unwrapping, baking and files."""
