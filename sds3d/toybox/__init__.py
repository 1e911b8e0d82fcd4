"""The toybox: a procedural world of coloured toys, with captions and a fast renderer."""
