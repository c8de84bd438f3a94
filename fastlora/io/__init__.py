"""Other libraries' checkpoint layouts, as pure functions from tensors to tensors."""
