"""A small HTTP server around one Upscaler: ``rcod-serve``."""
