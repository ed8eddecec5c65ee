"""Checkpoints of other frameworks, read without them: TensorFlow's and Flax's."""
