"""What is given of a clip beside its caption: which tokens are known, and how the model is told."""
