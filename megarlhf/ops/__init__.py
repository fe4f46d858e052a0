"""The maths of RLHF as pure functions: tensors and numbers in, tensors out."""
