"""The learner: packed forward and backward passes under DeepSpeed."""
