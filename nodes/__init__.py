"""The nodes of HappyHorse, for ComfyUI. Nothing outside this folder knows the host."""
