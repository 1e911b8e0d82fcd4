"""Cameras and light: where views are taken from and what stands behind them."""
