"""Training: LoRA through the phases in one process group (trainer), its data (dataloader, shared_prefix), objectives, distillation, checkpoints, trackers."""
