"""AdaLoRA (Q. Zhang et al., 2303.10512): ranks go to the layers that need them, within one budget.

config = AdaLoraConfig(init_r=12, target_r=8, total_step=1000)
fastlora.convert(model, config)
allocator = RankAllocator(model, config)
for step, batch in enumerate(batches, start=1):
    loss = model(batch) + orthogonal_penalty(model)
    loss.backward()
    optimizer.step()
    allocator.step(step)  # after the optimizer, before the gradients are cleared
    optimizer.zero_grad()
"""

from fastlora.adalora.allocator import RankAllocator
from fastlora.adalora.penalty import orthogonal_penalty
from fastlora.adalora.triplets import rank_pattern
from fastlora.config import AdaLoraConfig

__all__ = ["AdaLoraConfig", "RankAllocator", "orthogonal_penalty", "rank_pattern"]
