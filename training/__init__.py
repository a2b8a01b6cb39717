"""Everything needed to train and judge the embedded model: a procedural captioned world, latents, text and scores."""
