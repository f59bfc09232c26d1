"""HTTP server of a trained run (`ddiff serve`)."""
