"""Small files from trained Gaussians, after LightGaussian: prune by significance, recover, quantise."""
