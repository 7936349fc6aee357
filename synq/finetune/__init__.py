"""Fine-tune the student on synthetic images: the training loop, its loss inputs, optimizers, schedules, checkpoints."""
