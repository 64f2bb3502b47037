"""Procedural people of clay: latents -> head -> skin, hair and things worn -> light -> camera -> crop."""
