"""Network parts that diffusers and transformers do not have."""
