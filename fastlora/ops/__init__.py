"""torch-only contracts and autograd: what an adapted linear computes, independent of who computes it."""
