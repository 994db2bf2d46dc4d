"""Training: of the miniature, of distilled models and of LoRAs; nothing of inference needs it."""
