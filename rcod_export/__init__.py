"""RCOD checkpoints to bundles: ONNX graphs, checked against PyTorch, with a manifest."""
