"""Tiny random pipelines of every model family, saved in the real format."""
