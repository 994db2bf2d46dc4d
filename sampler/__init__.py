"""Schedules, samplers, placement and the whole path from a prompt to a film: plain torch, no ComfyUI."""
