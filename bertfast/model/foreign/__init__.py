"""Checkpoints of other frameworks, read without them: TensorFlow's, Flax's and Keras'."""
