"""Drop-in modules: adapted linear layers, 4-bit weights, and the functions that put them into a model."""
