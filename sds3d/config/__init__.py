"""Typed YAML: files and overrides become frozen dataclasses; see `load.resolve`."""
