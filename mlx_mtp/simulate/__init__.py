"""What decoding would do on a machine that is known by its costs alone."""
