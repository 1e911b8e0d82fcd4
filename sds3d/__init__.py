"""sds3d: text to 3D by score distillation against a frozen 2D diffusion prior."""

__version__ = "0.1.0"
