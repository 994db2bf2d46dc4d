"""ComfyUI-HappyHorse: joint audio-video films from the daVinci-MagiHuman weights, in ComfyUI and from the
command line.
"""

__version__ = "0.1.0"
