"""What torch writes: `torch.save` old and new, TorchScript, torch.distributed.checkpoint."""
