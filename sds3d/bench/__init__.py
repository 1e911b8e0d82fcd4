"""Comparing guidance methods on equal terms: `sds3d bench guidance`."""
