"""Crop and landmarks to a masked crop: a 3D tool, a 2D tool, and what mixes them while training."""
