"""Who runs a problem: the registry of kernels, why each can or cannot, and what each is predicted to cost."""
