"""Sources of images: one module for each kind, beside the parts of the tar source."""
