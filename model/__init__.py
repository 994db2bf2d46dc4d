"""The networks, their configurations and checkpoints: plain torch, no ComfyUI."""
