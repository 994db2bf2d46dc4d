"""Fast operations beside their torch references: plain torch, no ComfyUI."""
