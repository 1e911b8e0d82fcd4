"""Runs in a process of their own, one after another, with every prior loaded once. Used by batches and the UI."""
