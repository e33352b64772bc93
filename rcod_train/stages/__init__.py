"""The stages of a training, in order: autoencoder, base denoiser, RCOD, metric estimation."""
